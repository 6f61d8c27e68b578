// What the receiver is asked: one page of an answer at a time, asked again while it is shown.

import { restored } from "./text.js";

/** Between two questions, at least and at most; in between it is so many times what the answer took. */
const EVERY_MS = 5000;
const AT_MOST_MS = 30_000;
const RESTS = 10;

/** The answer to `path?query` as an object. Throws an Error whose message is for people. */
export async function answerOf(path, query, signal) {
  const asked = new URLSearchParams(Object.entries(query).filter(([, text]) => text !== null && text !== undefined && text !== ""));
  let answer;
  try {
    answer = await fetch(`${path}?${asked}`, { headers: { Accept: "application/json" }, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The receiver does not answer; it is asked again.");
  }
  let found = null;
  try {
    found = JSON.parse(await answer.text(), restored);
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (answer.ok && found) return found;
  throw new Error(found?.error ?? `The receiver answers with ${answer.status}.`);
}

/** Asks one question again and again; the next `ask` ends the one before. */
export class Asking {
  #changed;
  #timer = 0;
  #running = null;
  #path = "";
  #query = {};

  /** `changed({ answer })`, or `changed({ error })`, comes after each answer. */
  constructor(changed) {
    this.#changed = changed;
    document.addEventListener("visibilitychange", () => !document.hidden && this.#path && this.#run());
  }

  ask(path, query) {
    this.#path = path;
    this.#query = query;
    return this.#run();
  }

  /** Asks no more. */
  end() {
    this.#path = "";
    this.#running?.abort();
    clearTimeout(this.#timer);
  }

  async #run() {
    this.#running?.abort();
    clearTimeout(this.#timer);
    const mine = (this.#running = new AbortController());
    const begun = performance.now();
    let found;
    try {
      found = { answer: await answerOf(this.#path, this.#query, mine.signal) };
    } catch (error) {
      found = { error: error.message };
    }
    if (mine.signal.aborted) return;
    this.#changed(found);
    if (!document.hidden) this.#timer = setTimeout(() => this.#run(), Math.min(AT_MOST_MS, Math.max(EVERY_MS, RESTS * (performance.now() - begun))));
  }
}
