// What the agent is asked for again and again, while a tab shows it.

import { element, restored, visible } from "./text.js";

const EVERY_MS = 2000;

/** One address of the agent, asked while `show(true)` holds. `changed()` comes after each answer. */
export class Polled {
  #path;
  #absent;
  #changed;
  #timer = 0;
  #isShown = false;
  #turn = 0;
  /** The last answer; undefined before the first. */
  report;
  error = "";

  constructor(path, absent, changed) {
    this.#path = path;
    this.#absent = absent;
    this.#changed = changed;
    document.addEventListener("visibilitychange", () => this.#isShown && !document.hidden && this.show(true));
  }

  /** Whether it is shown: only then is the agent asked. */
  show(isShown) {
    this.#isShown = isShown;
    clearTimeout(this.#timer);
    if (isShown) this.#ask();
  }

  async #ask() {
    this.#turn += 1;
    const turn = this.#turn;
    try {
      const answer = await fetch(this.#path, { headers: { Accept: "application/json" } });
      if (answer.status === 404) throw new Error(this.#absent);
      if (!answer.ok) throw new Error(`The agent answers with ${answer.status}; it is asked again.`);
      this.report = JSON.parse(await answer.text(), restored);
      this.error = "";
    } catch (error) {
      this.error = error instanceof TypeError ? "The agent does not answer; it is asked again." : error.message;
    }
    // Another question may be under way by now, or the tab no longer shown.
    if (!this.#isShown || turn !== this.#turn) return;
    this.#changed();
    if (!document.hidden) this.#timer = setTimeout(() => this.#ask(), EVERY_MS);
  }
}

/** What stands for a report that is not there; null: it is. */
export function stateOf({ report, error }) {
  if (error) return [element("p", { class: "warning", role: "alert" }, visible(error))];
  return report === undefined ? [element("p", { role: "status" }, "asking the agent …")] : null;
}
