// The history of stale files: which process had what mapped that was not the file on disk, from when to when.

import { Polled, stateOf } from "./polled.js";
import { hitNodes } from "./search.js";
import { element, lasting, name, orDash, stamp, visible } from "./text.js";
import { pathNodes, userOf } from "./views.js";

const ENDS = { unmapped: "the process ended or has it no more", restored: "the file is back under its name" };

/** The agent's history, while the tab is shown. */
export class StaleTab extends Polled {
  constructor(changed) {
    super("/page/stale", "This agent keeps no history of stale files.", changed);
  }

  /** A row for each time in which a process had a stale file, with a `key` that it keeps. */
  rows() {
    return (this.report?.spells ?? []).map((row) => ({ ...row, key: row.number }));
  }
}

const lasted = (row) => `${row.older ? "> " : ""}${lasting((row.until_ms ?? Date.now()) - row.since_ms)}`;

/** How the table shows it. `links`, `hits(row)` and `words()` as of the other views. */
export const staleView = (links, { hits, words }) => ({
  order: "since",
  isDown: true,
  placeholder: "path, process, PID, unit, user, container",
  only: { title: "only what is stale now", holds: (row) => row.until_ms === null },
  fields: (row) => [
    ["path", row.path],
    ["name", row.comm],
    ["PID", String(row.pid)],
    ["unit", row.unit],
    ["user", userOf(row)],
    ["container", row.container],
    ["build id", row.build_id],
  ],
  columns: [
    { key: "path", title: "Path", className: "wide", cell: (row) => [element("a", { href: links.library(row), title: visible(row.path), "aria-label": visible(row.path) }, pathNodes(row.path, words())), ...hitNodes(hits(row), words())], order: (row) => row.path },
    { key: "process", title: "Process", className: "short", cell: (row) => element("a", { href: links.process(row) }, name(`${row.pid} ${row.comm ?? ""}`)), order: (row) => row.pid },
    { key: "stale", title: "Stale", className: "short", cell: (row) => (row.until_ms === null ? element("span", { class: "badge", title: orDash(row.reason) }, row.stale) : element("span", {}, `was ${row.stale}`)), order: (row) => row.stale },
    { key: "since", title: "Noticed", className: "time less", descends: true, cell: (row) => stamp(row.since_ms), order: (row) => row.since_ms },
    { key: "lasted", title: "For", className: "short less", descends: true, cell: lasted, order: (row) => (row.until_ms ?? Date.now()) - row.since_ms },
    { key: "unit", title: "Unit", className: "unit least", cell: (row) => name(row.unit), order: (row) => row.unit },
    { key: "end", title: "To end it, or how it ended", className: "wide least", cell: (row) => element("span", { title: orDash(ENDS[row.cause] ?? row.restart) }, ENDS[row.cause] ?? orDash(row.restart)), order: (row) => row.cause ?? row.restart },
  ],
});

/** What stands above the table. */
export function aboutStale({ report, error }) {
  const waiting = stateOf({ report, error });
  if (waiting) return waiting;
  if (report.compared_ms === null) return [element("p", { role: "status" }, "Mapped files are being compared with the disk for the first time.")];
  const now = report.spells.filter((row) => row.until_ms === null);
  const processes = new Set(now.map((row) => row.pid)).size;
  const how = report.interval_s ? `every ${report.interval_s} s` : "while a page is open: stale_interval_s is 0";
  const words = now.length ? `Stale now: ${count(now.length, "file", "files")} in ${count(processes, "process", "processes")}.` : "Nothing is stale now.";
  return [
    element("p", { class: now.length ? "warning" : null, role: "status" }, words),
    element("p", { class: "key" }, `Compared ${how}, last at ${stamp(report.compared_ms)}. The last ${report.kept} are kept, since the agent started${report.left_out ? `; ${report.left_out} older ones are not` : ""}.`),
  ];
}

const count = (number, one, several) => `${number.toLocaleString("en")} ${number === 1 ? one : several}`;
