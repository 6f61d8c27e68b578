// One library, one process, or the agent's answer to "why": in a dialog, kept up to date while it is open.

import { address, encoded } from "./address.js";
import { element, lasting, name, orDash, shortId, restored, since, stamp, visible } from "./text.js";
import { podOf, userOf } from "./views.js";

const WHY = {
  pattern: "its pattern is not found in the path",
  kind: "it takes other kinds of files",
  exports: "the file does not export",
  exports_unknown: "what the file exports cannot be read",
  exports_given_up: "the search of its symbols was given up before it found",
  earlier_rule: "an earlier rule has it",
};
const UNTOLD = {
  no_rule: "no rule wants it",
  not_selected: "the watch was narrowed down to other processes",
  passing: "a child that shares its parent's memory and may exec at any moment",
  awaiting_facts: "its file is still being read",
  baseline: "it was there before the watch, which leaves that out",
  unresolved: "what the file exports could not be read when it was mapped",
  not_in_map: "the map does not have it",
};
const NOTES = {
  kernel_thread: "a kernel thread, which maps no library",
  zombie: "it has ended, nothing is mapped any more",
  no_permission: "its mappings may not be read by the agent",
  no_files: "it has no file mapped executable",
  static: "it has no dynamic loader",
  narrow: "a 32-bit process, which is read again and again",
  nothing_wanted: "no rule wants any of its files",
  nothing_wants: "no rule wants it",
  not_mapped: "no process has it mapped",
  not_regular: "it is no regular file",
  unread: "the kernel does not answer who reads its mappings: what is known may be old",
  unrepaired: "records were lost and the mapping table is not repaired yet",
  published_only: "only what this watch reports is shown here; `sowatch debug explain`, on the host, shows the rest",
};

const FLOWS = {
  tappable: "it can have some",
  no_tls: "none: it has no library of OpenSSL, GnuTLS or NSS; HTTP without TLS is not seen",
  unread: "not known: what it has mapped cannot be read",
  kernel_refuses: "none: the kernel puts no probes into its mapping of the TLS library",
  not_exported: "none: OpenSSL is linked into its program, which does not export it",
  go: "none: it is a Go program, which brings a TLS of its own",
  rustls: "none: rustls is linked into its program, and has no functions that could be probed",
  java: "none: it is a Java machine, which brings a TLS of its own",
  static: "none: its program is static and has no symbols",
  off: "none: [http] of the agent is off",
  not_selected: "none: [http] of the agent selects other processes",
  refused: "none: its TLS library could not be tapped",
  not_attached: "none yet: its TLS library is not attached",
  no_call: "none yet: its TLS library is attached, and it has not read or written by it since",
  no_http: "none: it has read or written by its TLS library, and that was no HTTP so far",
  flows: "it has some",
};

const UNPROBED = {
  shared: "none in its shared executable mappings",
  writable: "none in mappings that are writable, too",
  hugetlb: "none, as its file is of huge pages",
};

/** Pairs of a title and what stands behind it. */
export const facts = (pairs) =>
  element("dl", { class: "facts" }, ...pairs.flatMap(([title, value]) => [element("dt", {}, title), element("dd", {}, value)]));

/** Rows of a list that are shown at first, and with each press of its button. */
const ROWS = 500;
/** How many are shown by now, by list. */
const shown = new Map();

/** Forgets which lists were made longer. */
export const forgetLists = () => shown.clear();

/** A table of `rows`, each as the cells that `cellsOf` makes of it; the first `ROWS`, and a button that adds as many. */
export function list(head, rows, cellsOf = (row) => row) {
  const id = head.join();
  const made = (row) => element("tr", {}, ...cellsOf(row).map((cell) => element("td", {}, cell)));
  const heads = element("tr", {}, ...head.map((title) => element("th", { scope: "col" }, title)));
  const body = element("tbody", {}, ...rows.slice(0, shown.get(id) ?? ROWS).map(made));
  const more = element("button", { type: "button" });
  const scroller = element("div", { class: "scroller", tabindex: "0" }, element("table", {}, element("thead", {}, heads), body), more);
  const count = () => {
    more.textContent = `${rows.length - body.rows.length} more`;
    more.hidden = body.rows.length >= rows.length;
  };
  more.addEventListener("click", () => {
    const has = body.rows.length;
    shown.set(id, has + ROWS);
    body.append(...rows.slice(has, has + ROWS).map(made));
    body.rows[has].querySelector("a")?.focus();
    count();
  });
  count();
  return scroller;
}

const whence = (row) => (row.older ? "before the watch" : `${stamp(row.since_ms)}, for ${lasting(Date.now() - row.since_ms)}`);
const link = (href, text) => element("a", { href }, name(text));

/** Who has a library. `others`: rows of the same path or build id. */
export function libraryFacts(row, others, inventory, links) {
  const isSame = (other) => ["dev", "inode", "generation", "subvol"].every((key) => other[key] === row[key]);
  const users = row.holders.map((number) => inventory.processes.get(number)).filter(Boolean);
  return [
    facts([
      ["path", name(row.path)],
      ["build id", orDash(row.build_id)],
      ["soname", name(row.soname)],
      ["kind", row.kind],
      ["file", `device ${row.dev}, inode ${row.inode}, generation ${orDash(row.generation)}`],
      ["on disk", onDisk(row)],
      ["mapped since", whence(row)],
      ...[...inventory.libraries.values()].filter((other) => other !== row && isSame(other)).map((other) => ["also as", link(links.library(other), other.path)]),
      ...others.filter((other) => !isSame(other)).map((other) => [relation(other, row), link(links.library(other), other.path)]),
    ]),
    ...callsTable(inventory.calls.get(row.number) ?? []),
    element("h3", {}, `Who has it (${users.length})`),
    list(["PID", "name", "user", "unit", "container", "program"], users, (one) => [
      processLink(one, links),
      name(one.comm),
      name(userOf(one)),
      name(one.unit),
      shortId(one.container),
      name(one.exe),
    ]),
  ];
}

const relation = (other, row) => (other.build_id === row.build_id && row.build_id ? "same build" : "same path");
const processLink = (one, links) => element("a", { href: links.process(one) }, String(one.pid));

/** What stands for a row that is no longer there, or never was: others that may be meant. */
export function missing(what, others, links) {
  if (!others.length) return [element("p", {}, "Nothing of this name is there now.")];
  const title = what === "library" ? "Mapped now, of the same path or build id" : "The process that has this PID now";
  const rows = others.map((one) => element("li", {}, what === "library" ? link(links.library(one), one.path) : link(links.process(one), `${one.pid} ${one.comm ?? ""}`)));
  return [element("h3", {}, title), element("ul", {}, ...rows)];
}

/** Which of several is meant by a name. */
export function choices(found) {
  const shownAs = (row) => (row.pid === undefined ? `${row.path}, in ${row.holders.length === 1 ? "1 process" : `${row.holders.length} processes`}` : `process ${row.pid} ${row.comm}`);
  const rows = found.map(({ target, row }) => element("li", {}, link(address("why", target), shownAs(row))));
  return [element("p", {}, "Several have this name. Which one?"), element("ul", {}, ...rows)];
}

/** Calls of its functions by all processes, where a rule counts them. */
function callsTable(rows) {
  if (!rows.length) return [];
  const sorted = [...rows].sort(([, a], [, b]) => b - a);
  return [
    element("h3", {}, `Calls that a rule counts (${rows.length} functions)`),
    list(["function", "calls", "half of them within", "99 % within"], sorted, ([symbol, calls, p50, p99]) => [
      name(symbol),
      calls.toLocaleString("en"),
      duration(p50),
      duration(p99),
    ]),
  ];
}

function duration(ns) {
  if (ns === null) return "-";
  if (ns < 1e3) return `${ns} ns`;
  if (ns < 1e6) return `${(ns / 1e3).toPrecision(3)} µs`;
  return ns < 1e9 ? `${(ns / 1e6).toPrecision(3)} ms` : `${(ns / 1e9).toPrecision(3)} s`;
}

/** What a process has. */
export function processFacts(row, inventory, links) {
  const libraries = [...inventory.libraries.values()].filter((one) => one.holders.includes(row.number));
  libraries.sort((a, b) => (a.path < b.path ? -1 : 1));
  return [
    facts([
      ["PID", row.ns_pid && row.ns_pid !== row.pid ? `${row.pid}, in its own namespace ${row.ns_pid}` : String(row.pid)],
      ["name", name(row.comm)],
      ["program", name(row.exe)],
      ["user", name(userOf(row))],
      ["unit", name(row.unit)],
      ["container", orDash(row.container)],
      ...(row.pod ? [["pod", name(podOf(row))]] : []),
      ["cgroup", name(row.cgroup)],
      ["seen since", whence(row)],
    ]),
    element("h3", {}, `What it has mapped (${libraries.length})`),
    list(["path", "build id", "stale", "since"], libraries, (one) => [
      link(links.library(one), one.path),
      shortId(one.build_id),
      orDash(one.stale),
      since(one),
    ]),
  ];
}

/** Whether a text can be a build id: linkers write 8, 16, 20 or 32 bytes. */
export const isBuildId = (text) => /^[0-9a-f]{16,64}$/i.test(text);

/** Asks the agent; the answer, or an `Error` with words for people. */
export async function ask(target) {
  const parameter = /^\d+$/.test(target) ? "pid" : isBuildId(target) ? "build_id" : "path";
  let answer;
  try {
    answer = await fetch(`/explain?${parameter}=${encoded(target)}`, { headers: { Accept: "application/json" } });
  } catch {
    throw new Error("The agent does not answer. Is it still running?");
  }
  let report = null;
  try {
    report = JSON.parse(await answer.text(), restored);
  } catch {
    // What stands between here and the agent may answer otherwise than in JSON.
  }
  if (!answer.ok) throw new Error(report?.error ?? `The agent says ${answer.status}.`);
  return report;
}

/** An explanation of a whole process or path. */
export function explanation(report) {
  return report.target === "process" ? aboutProcess(report) : aboutPath(report);
}

/** The part of an explanation of a process that is about one file. */
export function explanationOf(report, library) {
  const found = report.mappings?.find(
    ({ library: one }) => one.inode === library.inode && one.dev === library.dev && one.generation === library.generation,
  );
  return found ? [facts(aboutMapping(found))] : [element("p", {}, "The process does not have it mapped any more.")];
}

function aboutProcess(report) {
  return [
    facts([
      ["process", `${report.process.pid}, ${report.state}, threads ${report.threads}`],
      ["name", name(report.process.comm)],
      ["in the map", report.map ? `yes, with ${report.map.files} files${report.map.awaits_reading ? ", to be read again" : ""}` : "no"],
      ...report.notes.map((note) => ["note", NOTES[note] ?? note]),
      ...(report.http ? [["HTTP flows", flowsOf(report.http)]] : []),
      ...(report.withheld ? [["not shown", `${report.withheld} files that no rule wants`]] : []),
      ...report.extra.map((one) => ["in the map, but not mapped", name(one.path)]),
    ]),
    ...report.mappings.flatMap((one) => [element("h3", {}, name(one.library.path)), facts(aboutMapping(one))]),
  ];
}

function flowsOf({ state, reason, calls, flows }) {
  const counts = calls ? ` (calls: ${calls.toLocaleString("en")}, flows: ${flows.toLocaleString("en")})` : "";
  return `${FLOWS[state] ?? orDash(state)}${reason ? `: ${visible(reason)}` : ""}${counts}`;
}

function aboutMapping(one) {
  const seen = one.seen
    ? `yes: rule ${orDash(one.seen.rule)}, cause ${orDash(one.seen.cause)}, ${orDash(one.seen.time)}`
    : `no: ${UNTOLD[one.untold] ?? orDash(one.untold)}`;
  return [
    ["covered", seen],
    ...aboutRules(one.rules),
    ["the kernel side", verdict(one.verdict)],
    ["its file", fileState(one.file)],
    ...one.activations.map((each) => ["activation", `${orDash(each.rule)}: ${orDash(each.state)}`]),
    ...one.blocked.map((each) => ["blocked", `${orDash(each.rule)}: ${orDash(each.reason)}`]),
    ...one.attachments.flatMap(aboutAttachment),
    ...one.unprobed.map((why) => ["uprobes", `the kernel puts ${UNPROBED[why] ?? orDash(why)}`]),
    ...one.differences.map((each) => ["the map differs", `${orDash(each.kind)} ${each.range.join("-")}`]),
  ];
}

function aboutPath(report) {
  return [
    facts([
      ["path", name(report.path)],
      ["leads to", name(report.resolved)],
      ["covered", report.rule === null ? "no: no rule wants it" : `yes, by rule ${orDash(report.rule)}`],
      ...aboutRules(report.rules),
      ["the kernel side", verdict(report.verdict)],
      ["the file", report.error ? orDash(report.error) : fileState(report.file)],
      ...report.activations.map((each) => ["activation", `${orDash(each.rule)}: ${orDash(each.state)}`]),
      ...report.blocked.map((each) => ["blocked", `${orDash(each.rule)}: ${orDash(each.reason)}`]),
      ...report.attachments.flatMap(aboutAttachment),
      ...report.notes.map((note) => ["note", NOTES[note] ?? note]),
    ]),
    element("h3", {}, `Who has it (${report.mapped.length})`),
    list(["PID", "name", "how", "in the map"], report.mapped, (one) => [
      String(one.process.pid),
      name(one.process.comm),
      one.relation.replace("_", " "),
      one.in_map ? "yes" : "no",
    ]),
  ];
}

/** What a rule has attached to a file: those that work as one line, each other one with its reason. */
function aboutAttachment({ rule, state, reason, lingering, probes }) {
  const title = `probes of ${orDash(rule)}`;
  const working = probes.filter((probe) => probe.state === "attached").length;
  const said = reason ? `${state}: ${orDash(reason)}` : `${state}, ${working} of ${probes.length}${lingering ? ", until it lingers no more" : ""}`;
  const others = probes.filter((probe) => probe.state !== "attached");
  return [[title, said], ...others.map((probe) => [title, `${orDash(probe.symbol)}: ${probe.state}: ${orDash(probe.reason)}`])];
}

const aboutRules = (rules) =>
  rules.map((answer) => {
    const missing = answer.missing.length ? ` ${answer.missing.map(orDash).join(", ")}` : "";
    return [`rule ${orDash(answer.rule)}`, answer.wants ? "wants it" : `no: ${WHY[answer.why] ?? orDash(answer.why)}${missing}`];
  });

const verdict = ({ verdict: word, seconds_left: left }) =>
  ({
    match: "reports it",
    ignore: `drops it${left === null ? "" : `, for ${left} s more`}`,
    none: "asks when it is mapped",
    mixed: "has several answers for its names",
  })[word] ?? orDash(word);

const fileState = (look) => (look.reason ? `${orDash(look.elf)}: ${orDash(look.reason)}` : orDash(look.elf));

/** What became of a library's file since it was mapped. */
function onDisk(row) {
  if (row.stale === "unknown") return `unknown: ${row.stale_reason}`;
  return row.stale ? `${row.stale} since it was mapped: restart who has it` : "unchanged";
}
