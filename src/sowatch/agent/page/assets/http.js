// HTTP flows inside TLS: the endpoints as the agent has them at `/http`, and what of them is not known.

import { address } from "./address.js";
import { Polled, stateOf } from "./polled.js";
import { element, name, orDash, visible } from "./text.js";
import { cutNodes } from "./views.js";

/** What is counted beside the flows: title, what it means, and how it follows from the agent's figures. */
const UNKNOWN = [
  ["incomplete", "flows whose end was not seen", (stats) => stats.incomplete],
  ["undecoded", "connections that have shown no HTTP", (stats) => stats.undecoded],
  ["truncated", "calls whose bytes were not captured where they were needed", (stats) => stats.truncated],
  ["joined late", "responses whose request passed before the probes came, and connections joined in the middle", (stats) => stats.joined_late],
  ["unknown peers", "flows whose socket was never seen", (stats) => stats.unknown_peers],
  ["unknown fields", "HTTP/2 fields that were sent before the probes came", (stats) => stats.unknown_fields],
  ["resyncs", "losses of framing, each followed by a search for the next message", (stats) => stats.resyncs],
];
/** Where calls and flows are lost; the words are those of `sowatch_http_lost_total`. */
const LOST = [
  ["ring", "calls that the programs could not send", (stats) => stats.lost],
  ["unreadable", "calls whose bytes could not be read", (stats) => stats.unreadable],
  ["connections", "calls of connections that were too many for the programs", (stats) => stats.no_room],
  ["ends", "ends of connections that the programs could not send: their last flow waits for the end of the process", (stats) => stats.lost_ends],
  ["table", "connections and requests given up for want of space", (stats) => stats.dropped],
  ["stream", "flows that are counted and were not published, because too many waited", (stats) => stats.unpublished],
];

/** The agent's endpoints, while the tab is shown; `report` is null if it captures no HTTP. */
export class HttpTab extends Polled {
  constructor(changed) {
    super("/http", "This agent does not report HTTP flows.", changed);
  }

  /** The endpoints, each with a `key` that it keeps. */
  rows() {
    return (this.report?.endpoints ?? []).map((row) => ({ ...row, key: keyOf(row) }));
  }

  /** The endpoint that an address names. */
  row({ value, more }) {
    return this.rows().find((row) => row.key === keyOf({ path: value, side: more.get("side"), method: more.get("method"), authority: more.get("host") }));
  }
}

const keyOf = ({ side, method, authority, path }) => JSON.stringify([side, method || null, authority || null, path]);
const addressOf = (row) => address("endpoint", row.path, { side: row.side, method: row.method, host: row.authority });
/** One line that names an endpoint. */
export const titleOf = (row) => `${row.method ?? "any method"} ${row.authority ?? ""}${row.path}`;
const percentile = (value) => (value === null ? "–" : milliseconds(value));
function milliseconds(value) {
  if (value < 1) return `${Math.round(1000 * value)} µs`;
  return value < 1000 ? `${value.toFixed(1)} ms` : `${(value / 1000).toFixed(2)} s`;
}
const badge = (count) => (count ? element("span", { class: "badge" }, count.toLocaleString("en")) : "");
const number = (key, title, cell, className = "number") => ({ key, title, className, descends: true, cell, order: (row) => row[key] });

/** How the table shows endpoints. */
export const VIEW = {
  order: "flows",
  isDown: true,
  placeholder: "host, path, method, side",
  only: { title: "only with errors", holds: (row) => row.errors > 0 },
  fields: (row) => [
    ["endpoint", titleOf(row)],
    ["side", row.side],
  ],
  columns: [
    { key: "path", title: "Endpoint", className: "wide", cell: (row) => element("a", { href: addressOf(row), title: visible(titleOf(row)), "aria-label": visible(`${row.authority ?? ""}${row.path}`) }, cutNodes(visible(row.authority ?? "") + visible(row.path), visible(row.authority ?? "").length)), order: (row) => `${row.authority ?? ""}${row.path}` },
    { key: "method", title: "Method", className: "method", cell: (row) => orDash(row.method), order: (row) => row.method },
    { key: "side", title: "Side", className: "side less", cell: (row) => row.side, order: (row) => row.side },
    number("flows", "Flows", (row) => row.flows.toLocaleString("en")),
    number("errors", "Errors", (row) => badge(row.errors), "number less"),
    number("incomplete", "Incomplete", (row) => badge(row.incomplete), "number least"),
    number("p50_ms", "p50", (row) => percentile(row.p50_ms), "number least"),
    number("p95_ms", "p95", (row) => percentile(row.p95_ms)),
    number("p99_ms", "p99", (row) => percentile(row.p99_ms), "number less"),
  ],
};

const TURN_ON = [
  element("p", {}, "This agent captures no HTTP. To turn it on, put this into its configuration, /etc/sowatch/config.toml as installed:"),
  element("pre", {}, "[http]\nenabled = true"),
  element("p", {}, "and have the agent read it again: systemctl reload sowatch, or SIGHUP. It needs the extra http: pip install 'sowatch[http]'."),
];

/** What stands above the table: the state in words, and each figure of what is not known. */
export function aboutHttp({ report, error }) {
  const waiting = stateOf({ report, error });
  if (waiting) return waiting;
  if (report === null) return TURN_ON.map((one) => one.cloneNode(true));
  return [
    ...(report.running ? [] : [element("p", { class: "warning", role: "alert" }, "The capture has ended by itself: the agent's log has the reason. Restart the agent, or change [http].")]),
    ...(report.flows_seen ? [] : [element("p", { role: "status" }, nothingYet(report))]),
    element("dl", { class: "figures" }, figure("flows", "requests with their responses since [http] was turned on", report.flows_seen, false), ...figures(report.stats)),
    ...notTapped(report.not_tapped),
    ...(report.sees_sockets ? [] : [element("p", { class: "key" }, "This kernel has no tracepoints of sockets: peers are known by descriptors.")]),
    element("p", { class: "key" }, `${endpoints(report.endpoints)} `, element("a", { href: "#flows" }, "The last flows")),
  ];
}

const endpoints = (rows) => (rows.length < 200 ? `Paths are reduced: parts that name one of many things are *.` : `The 200 endpoints with most flows; metrics have all.`);

function nothingYet(report) {
  if (!report.files) return "No flow yet: no process has a TLS library mapped that can be tapped. sowatch explain PID says why a process has none.";
  const files = report.files === 1 ? "1 TLS library is" : `${report.files} TLS libraries are`;
  return `No flow yet: ${files} attached, and no request has passed since. sowatch explain PID says why a process has no flows.`;
}

const figures = (stats) => [
  ...UNKNOWN.map(([title, meaning, count]) => figure(title, meaning, count(stats), true)),
  ...LOST.map(([where, meaning, count]) => figure(`lost: ${where}`, meaning, count(stats), true)),
];

const figure = (title, meaning, value, isUnknown) =>
  element(
    "div",
    { class: isUnknown && value ? "warning" : null, title: meaning },
    element("dt", {}, title),
    element("dd", {}, (value ?? 0).toLocaleString("en")),
  );

function notTapped(files) {
  if (!files.length) return [];
  const rows = files.map((one) => element("li", {}, name(one.path), `: ${orDash(one.reason)}`));
  const title = files.length === 1 ? "1 TLS library is not tapped" : `${files.length} TLS libraries are not tapped`;
  return [element("details", { class: "warning" }, element("summary", {}, title), element("ul", {}, ...rows))];
}

/** Of one endpoint: its figures, and those of the last flows that were counted under it. */
export function endpointFacts(row, report, { facts, list, processLink }) {
  const isOf = (flow) => keyOf({ ...flow, ...flow.endpoint }) === row.key;
  return [
    facts([
      ["path", name(row.path)],
      ["host", orDash(row.authority)],
      ["method", orDash(row.method)],
      ["side", row.side === "server" ? "server: the process answers" : "client: the process asks"],
      ["flows", row.flows.toLocaleString("en")],
      ["errors", `${row.errors.toLocaleString("en")}, which are 5xx${row.side === "client" ? " and 4xx" : ""}`],
      ["incomplete", `${row.incomplete.toLocaleString("en")}, whose end was not seen`],
      ["half of them within", percentile(row.p50_ms)],
      ["95 % within", percentile(row.p95_ms)],
      ["99 % within", percentile(row.p99_ms)],
    ]),
    ...flowsTable(report.flows?.filter(isOf) ?? null, { list, processLink }),
  ];
}

/** The last flows, newest first; null: they are not shown here. */
export function flowsTable(flows, { list, processLink }) {
  if (flows === null) {
    return [
      element("h3", {}, "Last flows"),
      element("p", {}, "Single flows are not shown over TCP, where every user of the host may ask. Set flows_over_tcp = true in [http], or ask the socket: sowatch http."),
    ];
  }
  return [
    element("h3", {}, `Last flows (${flows.length})`),
    list(
      ["time", "status", "duration", "request", "process", "peer", "bytes", "complete"],
      flows.toReversed().map((one) => [
        one.time.slice(11, 23),
        orDash(one.status),
        percentile(one.duration_ms),
        name(`${one.method ?? "?"} ${one.authority ?? ""}${one.path ?? "?"}`),
        processLink(one.process),
        one.peer ? `${one.peer.address}:${one.peer.port}` : "unknown",
        `${one.request_bytes} / ${one.response_bytes}`,
        one.complete ? "yes" : "no: its end was not seen",
      ]),
    ),
  ];
}
