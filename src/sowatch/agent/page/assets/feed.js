// The connection: everything once, then changes; comes back by itself, and says in what state it is.

import { restored } from "./text.js";

const SILENCE_MS = 10_000; // the agent sends something every second
const FIRST_PAUSE_MS = 500;
const LAST_PAUSE_MS = 10_000;

/** The latest of all that was sent; `version` grows with each change. */
export class Inventory {
  version = 0;
  libraries = new Map();
  processes = new Map();
  seconds = [];
  status = {};
  calls = new Map(); // by number of the library: [symbol, calls, p50 in ns, p99 in ns], each

  replace(report) {
    this.version += 1;
    this.libraries = new Map(report.libraries.map((row) => [row.number, row]));
    this.processes = new Map(report.processes.map((row) => [row.number, row]));
    this.seconds = report.seconds;
    this.status = report.status;
    this.calls = new Map(Object.entries(report.calls).map(([number, rows]) => [Number(number), rows]));
  }

  change(report) {
    this.version += 1;
    for (const row of report.libraries) this.libraries.set(row.number, row);
    for (const row of report.processes) this.processes.set(row.number, row);
    for (const number of report.gone_libraries) this.libraries.delete(number);
    for (const number of report.gone_processes) this.processes.delete(number);
    this.seconds = this.seconds.concat(report.seconds).slice(-600);
    this.status = report.status;
    for (const [number, rows] of Object.entries(report.calls)) {
      if (rows.length) this.calls.set(Number(number), rows);
      else this.calls.delete(Number(number));
    }
  }

  /** All calls of a library's functions that are counted; null: none is. */
  callsOf(number) {
    const rows = this.calls.get(number);
    return rows ? rows.reduce((sum, [, calls]) => sum + calls, 0) : null;
  }
}

/** Follows the agent. `changed(inventory)` comes after each frame, `state(word)` when the connection changes. */
export function follow({ changed, state }) {
  const inventory = new Inventory();
  let pause = FIRST_PAUSE_MS;
  let source = null;
  let watchdog = 0;

  function again() {
    source.close();
    clearTimeout(watchdog);
    state("reconnecting");
    setTimeout(open, pause);
    pause = Math.min(LAST_PAUSE_MS, 2 * pause);
  }

  function heard(take) {
    return (event) => {
      clearTimeout(watchdog);
      watchdog = setTimeout(again, SILENCE_MS);
      pause = FIRST_PAUSE_MS;
      take(JSON.parse(event.data, restored));
      state("live");
      changed(inventory);
    };
  }

  function open() {
    source = new EventSource("/page/updates");
    watchdog = setTimeout(again, SILENCE_MS);
    source.addEventListener("everything", heard((report) => inventory.replace(report)));
    source.addEventListener("change", heard((report) => inventory.change(report)));
    source.addEventListener("error", again);
  }

  open();
}
