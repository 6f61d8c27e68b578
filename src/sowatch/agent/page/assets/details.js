// One library, one process, or the agent's answer to "why": in a dialog, kept up to date while it is open.

import { element, lasting, name, orDash, shortId, restored, since, stamp } from "./text.js";

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

const UNPROBED = {
  shared: "none in its shared executable mappings",
  writable: "none in mappings that are writable, too",
  hugetlb: "none, as its file is of huge pages",
};

const facts = (pairs) =>
  element("dl", { class: "facts" }, ...pairs.flatMap(([title, value]) => [element("dt", {}, title), element("dd", {}, value)]));

function list(head, rows) {
  const cells = (row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell)));
  const heads = element("tr", {}, ...head.map((title) => element("th", { scope: "col" }, title)));
  return element("div", { class: "scroller" }, element("table", {}, element("thead", {}, heads), element("tbody", {}, ...rows.map(cells))));
}

const whence = (row) => (row.older ? "before the watch" : `${stamp(row.since_ms)}, for ${lasting(Date.now() - row.since_ms)}`);
const link = (hash, text) => element("a", { href: hash }, name(text));

/** Who has a library. */
export function libraryFacts(row, inventory) {
  const same = [...inventory.libraries.values()].filter(
    (other) => other !== row && ["dev", "inode", "generation", "subvol"].every((key) => other[key] === row[key]),
  );
  const holders = row.holders.map((number) => inventory.processes.get(number)).filter(Boolean);
  return [
    facts([
      ["path", name(row.path)],
      ["build id", orDash(row.build_id)],
      ["soname", name(row.soname)],
      ["kind", row.kind],
      ["file", `device ${row.dev}, inode ${row.inode}, generation ${orDash(row.generation)}`],
      ["on disk", onDisk(row)],
      ["mapped since", whence(row)],
      ...same.map((other) => ["also as", link(`#library=${other.number}`, other.path)]),
    ]),
    ...callsTable(inventory.calls.get(row.number) ?? []),
    element("h3", {}, `Who has it (${holders.length})`),
    list(
      ["PID", "name", "container", "user", "program"],
      holders.slice(0, 500).map((one) => [
        element("a", { href: `#process=${one.number}` }, String(one.pid)),
        name(one.comm),
        shortId(one.container),
        orDash(one.uid),
        name(one.exe),
      ]),
    ),
    holders.length > 500 ? element("p", {}, `and ${holders.length - 500} more`) : null,
  ];
}

/** Calls of its functions by all processes, where a rule counts them. */
function callsTable(rows) {
  if (!rows.length) return [];
  const sorted = [...rows].sort(([, a], [, b]) => b - a);
  return [
    element("h3", {}, `Calls that a rule counts (${rows.length} functions)`),
    list(
      ["function", "calls", "half of them within", "99 % within"],
      sorted.slice(0, 200).map(([symbol, calls, p50, p99]) => [name(symbol), calls.toLocaleString("en"), duration(p50), duration(p99)]),
    ),
  ];
}

function duration(ns) {
  if (ns === null) return "-";
  if (ns < 1e3) return `${ns} ns`;
  if (ns < 1e6) return `${(ns / 1e3).toPrecision(3)} µs`;
  return ns < 1e9 ? `${(ns / 1e6).toPrecision(3)} ms` : `${(ns / 1e9).toPrecision(3)} s`;
}

/** What a process has. */
export function processFacts(row, inventory) {
  const libraries = [...inventory.libraries.values()].filter((one) => one.holders.includes(row.number));
  libraries.sort((a, b) => (a.path < b.path ? -1 : 1));
  return [
    facts([
      ["PID", row.ns_pid && row.ns_pid !== row.pid ? `${row.pid}, in its own namespace ${row.ns_pid}` : String(row.pid)],
      ["name", name(row.comm)],
      ["program", name(row.exe)],
      ["user", orDash(row.uid)],
      ["container", orDash(row.container)],
      ["cgroup", name(row.cgroup)],
      ["seen since", whence(row)],
    ]),
    element("h3", {}, `What it has mapped (${libraries.length})`),
    list(
      ["path", "build id", "stale", "since"],
      libraries.map((one) => [link(`#library=${one.number}`, one.path), shortId(one.build_id), orDash(one.stale), since(one)]),
    ),
  ];
}

/** Asks the agent; the answer, or an `Error` with words for people. */
export async function ask(target) {
  const parameter = /^\d+$/.test(target) ? "pid" : "path";
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

/** Percent-encoded bytes; surrogate escapes become the bytes they stand for. */
const encoded = (text) =>
  [...text]
    .map((char) => {
      const code = char.codePointAt(0);
      if (code >= 0xdc80 && code <= 0xdcff) return `%${(code - 0xdc00).toString(16).toUpperCase()}`;
      return encodeURIComponent(char.isWellFormed() ? char : "\ufffd");
    })
    .join("");

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
      ...(report.withheld ? [["not shown", `${report.withheld} files that no rule wants`]] : []),
      ...report.extra.map((one) => ["in the map, but not mapped", name(one.path)]),
    ]),
    ...report.mappings.flatMap((one) => [element("h3", {}, name(one.library.path)), facts(aboutMapping(one))]),
  ];
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
    list(
      ["PID", "name", "how", "in the map"],
      report.mapped.map((one) => [String(one.process.pid), name(one.process.comm), one.relation.replace("_", " "), one.in_map ? "yes" : "no"]),
    ),
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
