// Text that others chose, made safe to show; times and ids for people; elements without markup.

// What does not print as itself, and the backslash of the escapes: names look as they do in the terminal.
const UNPRINTABLE = /[\p{C}\p{Z}\\]/gu;
const SHORT = { "\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r" };

/** `text` with every control, direction and space character, and every byte that is not UTF-8, as an escape. */
export const visible = (text) => text.replace(UNPRINTABLE, escaped);

function escaped(char) {
  if (char === " ") return char;
  if (SHORT[char]) return SHORT[char];
  const code = char.codePointAt(0);
  const hex = (digits, value = code) => value.toString(16).padStart(digits, "0");
  if (code < 0x80) return `\\x${hex(2)}`;
  if (code >= 0xdc80 && code <= 0xdcff) return `\\x${hex(2, code - 0xdc00)}`;
  return code <= 0xffff ? `\\u${hex(4)}` : `\\U${hex(8)}`;
}

/**
 * A reviver for `JSON.parse`: names that are not UTF-8 come with their bytes in a member `..._bytes` beside them, and
 * become strings in which each such byte is a lone surrogate, U+DC80 to U+DCFF.
 */
export function restored(_key, value) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return value;
  for (const [key, bytes] of Object.entries(value)) {
    const plain = key.slice(0, -"_bytes".length);
    if (!key.endsWith("_bytes") || !Object.hasOwn(value, plain)) continue;
    if (typeof bytes === "string") value[plain] = fromBytes(bytes);
    else if (Array.isArray(bytes)) value[plain] = value[plain].map((text, at) => (bytes[at] === null ? text : fromBytes(bytes[at])));
    else continue;
    delete value[key];
  }
  return value;
}

const fromBytes = (base64) => textOf(Uint8Array.from(atob(base64), (char) => char.charCodeAt(0)));

/** Bytes as text; each that is not UTF-8 as a lone surrogate, U+DC80 to U+DCFF. */
export function textOf(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; ) {
    const first = bytes[at];
    const length = first < 0xc0 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    try {
      text += new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes.subarray(at, at + length));
      at += length;
    } catch {
      text += String.fromCharCode(0xdc00 + first);
      at += 1;
    }
  }
  return text;
}

/** A text, or a dash for none. */
export const orDash = (text) => (text === null || text === undefined || text === "" ? "–" : visible(String(text)));

/** The beginning of an id. */
export const shortId = (id) => orDash(id && id.slice(0, 12));

/** How long something has lasted, in one or two units. */
export function lasting(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** A time, in full. */
export const stamp = (ms) => new Date(ms).toISOString().replace("T", " ").slice(0, 19) + " UTC";

/** Since when a row is there; what was there before the watch is older than anybody saw. */
export const since = (row, now = Date.now()) => `${row.older ? "> " : ""}${lasting(now - row.since_ms)}`;

/** An element with attributes and children; texts become text, never markup. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A name that others chose: shown left to right, whatever letters are in it. */
export const name = (text) => element("bdi", { dir: "ltr", class: "name" }, orDash(text));
