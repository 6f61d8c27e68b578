// The search: which rows have all of its words, and in what of them.

import { element, visible } from "./text.js";

/** The words that are searched. */
export const wordsOf = (text) => text.trim().toLowerCase().split(/\s+/).filter(Boolean);

/**
 * Where a row has each of the words; null if it lacks one.
 *
 * `fields` are `[title, text]`, first what the row is shown as. Names are searched as they are and as they are shown.
 * The answer is `[title, text]` of the fields without which a word would be missing, the first field left out.
 */
export function matches(fields, words) {
  const hits = new Map();
  const has = (text, word) => text && (text.toLowerCase().includes(word) || visible(text).toLowerCase().includes(word));
  for (const word of words) {
    const found = fields.find(([, text]) => has(text, word));
    if (!found) return null;
    if (found[0] !== fields[0][0]) hits.set(found[0], found[1]);
  }
  return [...hits];
}

/** Nodes that show `text[from, to)`, with each of the words marked. `text` is visible already. */
export function marked(text, words, from = 0, to = text.length) {
  const small = text.toLowerCase();
  // A letter whose small form has another length would shift the marks.
  const ranges = small.length === text.length ? words.flatMap((word) => occurrences(small, word)) : [];
  const nodes = [];
  let at = from;
  for (const [begin, end] of ranges.sort(([a], [b]) => a - b)) {
    const [first, last] = [Math.max(at, begin), Math.min(to, end)];
    if (first >= last) continue;
    nodes.push(text.slice(at, first), element("mark", {}, text.slice(first, last)));
    at = last;
  }
  return [...nodes, text.slice(at, to)].filter((node) => node !== "");
}

function occurrences(text, word) {
  const found = [];
  for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) found.push([at, at + word.length]);
  return found;
}

/** What stands behind a name that was found by something else: `soname: libfoo.so.1`. */
export const hitNodes = (hits, words) =>
  hits.map(([title, text]) => element("span", { class: "hit" }, `${title}: `, element("bdi", { dir: "ltr" }, ...marked(visible(text), words))));
