// The address: what is shown, in words that mean the same on every page: paths, build ids and pids, no numbers of rows.

import { textOf } from "./text.js";

/** Percent-encoded bytes; surrogate escapes become the bytes they stand for. */
export const encoded = (text) =>
  [...text]
    .map((char) => {
      const code = char.codePointAt(0);
      if (code >= 0xdc80 && code <= 0xdcff) return `%${(code - 0xdc00).toString(16).toUpperCase()}`;
      return encodeURIComponent(char.isWellFormed() ? char : "\ufffd");
    })
    .join("");

/** What `encoded` was made of; what is no such text stands for itself. */
function decoded(text) {
  const bytes = [];
  for (const part of text.match(/%[0-9a-f]{2}|%|[^%]+/gi) ?? []) {
    if (part.length === 3 && part[0] === "%") bytes.push(parseInt(part.slice(1), 16));
    else bytes.push(...new TextEncoder().encode(part));
  }
  return textOf(Uint8Array.from(bytes));
}

// Slashes and colons may stand in a fragment as they are, which people can read.
const readable = (text) => encoded(text).replaceAll("%2F", "/").replaceAll("%3A", ":");

/** `#what=value&key=value`; what is null or empty is left out. */
export function address(what, value = null, more = {}) {
  const pairs = [[what, value], ...Object.entries(more)];
  const parts = pairs.map(([key, text], at) => (text === null || text === undefined || text === "" ? (at ? "" : key) : `${key}=${readable(String(text))}`));
  return `#${parts.filter(Boolean).join("&")}`;
}

/** The same taken apart: `{ what, value, more }`, of which `more` is a `Map`. */
export function parsed(hash) {
  const [[what, value], ...more] = hash
    .replace(/^#/, "")
    .split("&")
    .map((part) => {
      const cut = part.indexOf("=");
      return cut < 0 ? [part, ""] : [part.slice(0, cut), decoded(part.slice(cut + 1))];
    });
  return { what, value, more: new Map(more) };
}
