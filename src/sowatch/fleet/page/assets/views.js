// What each tab asks and shows: the address it asks, its columns, and the links between tabs.

import { address } from "./address.js";
import { element, lasting, name, orDash, shortId, stamp, visible } from "./text.js";

const count = (number) => Number(number).toLocaleString("en");
const some = (number, one, several) => `${count(number)} ${number === 1 ? one : several}`;

/** A link that is read out, and shown on demand, in full. */
const link = (href, title, ...nodes) => element("a", { href, title: visible(title) }, ...nodes);
const badge = (text, kind) => element("span", { class: `badge badge-${kind}` }, text);

const ago = (time) => (time ? element("time", { datetime: time, title: stamp(Date.parse(time)) }, `${lasting(Date.now() - Date.parse(time))} ago`) : "–");
const since = (time) => (time ? element("time", { datetime: time, title: stamp(Date.parse(time)) }, lasting(Date.now() - Date.parse(time))) : "–");

/** What a build is called: the package with its version, or the beginning of its build id. */
export const packageOf = (purl) => {
  const found = /^pkg:([^/]+)\/(?:.*\/)?([^/@?#]+)(?:@([^?#]*))?/.exec(purl);
  if (!found) return purl;
  const plain = (text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  };
  return `${plain(found[2])}${found[3] ? ` ${plain(found[3])}` : ""}`;
};
const packages = (purls) => (purls.length ? purls.map((purl) => element("span", { title: visible(purl), class: "one" }, name(packageOf(purl)))) : "–");
const buildLink = (id) => (id ? link(address("who", id), id, element("bdi", { dir: "ltr", class: "mono" }, shortId(id))) : "–");
const hostLink = (row) => link(address("host", row.host_id), `${row.host_name} (${row.host_id})`, name(row.host_name));

const STATE = { title: "State", className: "short", cell: (row) => badge(row.state, row.state) };
const whereOf = (row) => {
  const pod = row.pod && ([row.pod.namespace, row.pod.name].filter(Boolean).join("/") || row.pod.pod_uid);
  if (pod) return element("span", { title: visible(`container ${row.container}`) }, name(pod));
  if (row.container) return element("span", { title: visible(row.container) }, name(`container ${row.container.slice(0, 12)}`));
  return name(row.unit);
};
const baseOf = (path) => path.slice(path.lastIndexOf("/") + 1);
const pathCell = (path) => (path ? element("span", { title: visible(path) }, name(path)) : "–");

const HOSTS = [
  { title: "Host", className: "wide host", cell: hostLink },
  STATE,
  { title: "Why", className: "why", cell: (row) => orDash(row.reason) },
  { title: "Last heartbeat", className: "short", cell: (row) => ago(row.heard) },
  { title: "Groups", className: "number", cell: (row) => count(row.groups ?? 0) },
  { title: "Lost", className: "number", cell: (row) => count(row.lost ?? 0) },
  { title: "Not sent", className: "number less", cell: (row) => count(row.dropped ?? 0) },
  { title: "Strategy", className: "short less", cell: (row) => name(row.strategy) },
  { title: "Agent", className: "short less", cell: (row) => name(row.agent_version) },
];

const MAPPINGS = [
  { title: "Host", className: "wide host", cell: hostLink },
  { title: "Answer", className: "short", cell: (row) => (row.event === "fleet_host" ? [badge("not observed", row.state)] : badge(row.answer, row.answer === "mapped" ? "mapped" : row.state)) },
  { title: "Where", className: "wide", cell: (row) => (row.event === "fleet_host" ? orDash(row.reason) : whereOf(row)) },
  { title: "Program", className: "wide", cell: (row) => (row.exe ? element("span", { title: visible(row.exe) }, name(baseOf(row.exe))) : "–") },
  { title: "Processes", className: "number", cell: (row) => (row.process_count === undefined ? "" : count(row.process_count)) },
  { title: "PIDs", className: "wide", cell: (row) => (row.pids?.length ? `${row.pids.join(", ")}${row.process_count > row.pids.length ? " …" : ""}` : "") },
  { title: "Listens", className: "short less", cell: (row) => (row.listen?.length ? name(row.listen.join(", ")) : "") },
  { title: "Since", className: "short", cell: (row) => since(row.since) },
  { title: "Stale", className: "short", cell: (row) => (row.stale ? badge(row.stale, "stale") : "") },
  { title: "Build", className: "id", cell: (row) => (row.event === "fleet_host" ? "" : buildLink(row.build_id)) },
  { title: "Package", className: "wide", cell: (row) => (row.purl ? packages([row.purl]) : "") },
  { title: "Path", className: "wide least", cell: (row) => (row.path ? pathCell(row.path) : "") },
];

const LIBRARIES = [
  { title: "Library", className: "wide", cell: (row) => link(address("builds", row.name), row.name, name(row.name)) },
  { title: "Builds", className: "number", cell: (row) => count(row.builds) },
  { title: "Hosts", className: "number", cell: (row) => count(row.hosts) },
  { title: "Processes", className: "number", cell: (row) => count(row.processes) },
  { title: "Stale on", className: "number", cell: (row) => (row.stale_hosts ? badge(some(row.stale_hosts, "host", "hosts"), "stale") : "") },
  { title: "", className: "short", cell: (row) => [link(address("who", row.name), `who maps ${row.name}`, "who"), " ", link(address("time", row.name), `${row.name} over time`, "over time")] },
];

const BUILDS = [
  { title: "Build", className: "id", cell: (row) => buildLink(row.build_id) },
  { title: "Packages", className: "wide", cell: (row) => packages(row.purls) },
  { title: "Called", className: "wide less", cell: (row) => row.sonames.map((one) => element("span", { class: "one" }, name(one))) },
  { title: "Hosts", className: "number", cell: (row) => count(row.mapped_host_count) },
  { title: "Not observed", className: "number", cell: (row) => (row.not_observed_host_count ? badge(count(row.not_observed_host_count), "silent") : "0") },
  { title: "Processes", className: "number", cell: (row) => count(row.process_count) },
  { title: "Paths", className: "number less", cell: (row) => count(row.path_count) },
  { title: "Stale on", className: "number", cell: (row) => (row.stale_host_count ? badge(some(row.stale_host_count, "host", "hosts"), "stale") : "") },
  { title: "", className: "short", cell: (row) => link(address("time", row.build_id), `${row.build_id} over time`, "over time") },
];

const REASONS = [
  { title: "State", className: "short", cell: (row) => link(address("hosts", null, { state: row.state, search: row.reason }), `hosts: ${row.state}`, badge(row.state, row.state)) },
  { title: "Why", className: "why", cell: (row) => orDash(row.reason) },
  { title: "Hosts", className: "number", cell: (row) => count(row.hosts) },
];

/** By tab: what is asked, with `what` of the address if the tab has one; its columns; the title of its search, if it has one. */
export const VIEWS = {
  hosts: { path: "/api/coverage", columns: HOSTS, search: "Name, id or reason", hasState: true, empty: "No host has sent anything." },
  libraries: { path: "/api/libraries", columns: LIBRARIES, search: "Name contains", empty: "No library is mapped." },
  builds: { path: "/api/versions", columns: BUILDS, takes: "library", empty: "No build of this library is known." },
  who: { path: "/api/who", columns: MAPPINGS, takes: "soname, path, build id or purl", empty: "Nobody is known to map it." },
  time: { path: "/api/time", takes: "library or build id" },
  stale: { path: "/api/stale", columns: MAPPINGS, empty: "Nobody is known to run on a file that was replaced or deleted." },
  coverage: { path: "/api/reasons", columns: REASONS, empty: "No host has sent anything." },
};

/** For how many hosts an answer holds, in words. */
export function holdsFor(head) {
  const { answered, silent, lossy, unsupported } = head.hosts;
  const all = answered + silent + lossy + unsupported;
  const others = [`${count(silent)} silent`, `${count(lossy)} lossy`, `${count(unsupported)} unsupported`].filter((one) => !one.startsWith("0 "));
  return `This holds for ${count(answered)} of ${some(all, "host", "hosts")}${others.length ? `: ${others.join(", ")}` : ""}.`;
}

/** The answer itself, above the rows of those who map it. */
export function verdictOf(head) {
  if (!head.answer) return [];
  const numbers = [["mapped", head.mapped_host_count], ["not mapped", head.not_mapped_host_count], ["not observed", head.not_observed_host_count]];
  const parts = numbers.map(([words, number]) => element("div", {}, element("dt", {}, words), element("dd", {}, `${count(number)} hosts`)));
  const asked = head.targets.map((one) => `${one.kind.replace("_", " ")} ${one.text}`).join(", ");
  const builds = head.builds.slice(0, 12).map((one) => element("li", {}, buildLink(one.build_id), " ", ...[packages(one.purls)].flat(), " ", element("a", { href: address("time", one.build_id) }, "over time")));
  const rest = head.builds.length - builds.length;
  return [
    element("p", { class: "verdict" }, badge(head.answer, head.answer === "not observed" ? "silent" : head.answer === "mapped" ? "mapped" : "answered"), " ", name(asked)),
    element("dl", { class: "figures" }, ...parts),
    ...(builds.length ? [element("ul", { class: "builds" }, ...builds, ...(rest > 0 ? [element("li", {}, `and ${some(rest, "build", "builds")} more`)] : []))] : []),
  ];
}

/** All that is known of one host. */
export function hostFacts(row) {
  const fact = (title, value) => [element("dt", {}, title), element("dd", {}, value)];
  const facts = [
    fact("state", badge(row.state, row.state)),
    ...(row.reason ? [fact("why", orDash(row.reason))] : []),
    fact("last heartbeat", row.heard ? stamp(Date.parse(row.heard)) : "there was none"),
    fact("host id", name(row.host_id)),
    fact("groups", count(row.groups ?? 0)),
    fact("events lost", count(row.lost ?? 0)),
    fact("records not sent", count(row.dropped ?? 0)),
    fact("processes that cannot be read", count(row.unreadable ?? 0)),
    fact("strategy", name(`${row.strategy ?? ""}${row.guarantee ? `, ${row.guarantee}` : ""}`)),
    fact("limits", name((row.limits ?? []).join(", "))),
    fact("agent", name(row.agent_version)),
  ];
  return [element("h2", {}, name(row.host_name)), element("dl", { class: "facts" }, ...facts.flat())];
}
