// On how many hosts each build was mapped, over time: an SVG of steps, and the same in words.

import { element, name, stamp, visible } from "./text.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
/** Lines that can be distinguished; dashes for who does not see colours. */
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "1 4"];

function svg(kind, attributes, ...children) {
  const made = document.createElementNS(NAMESPACE, kind);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The next 1, 2 or 5 times a power of ten. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, value)));
  return power * [1, 2, 5, 10].find((step) => step * power >= value);
}

/**
 * `series`: { label, href, points: [[ms, hosts], ...] }, by time; each holds until the next. Between `from` and `to` in ms.
 */
export function chartOf(series, from, to) {
  const [width, height, left, right, bottom] = [900, 300, 84, 10, 24];
  const most = ceiling(Math.max(1, ...series.flatMap(({ points }) => points.map(([, hosts]) => hosts))));
  const x = (ms) => left + ((Math.min(to, Math.max(from, ms)) - from) / (to - from)) * (width - left - right);
  const y = (hosts) => 8 + (1 - hosts / most) * (height - bottom - 8);
  const line = ({ label, points }, at) => {
    const path = [];
    let last = 0;
    for (const [ms, hosts] of points) {
      path.push(`${x(ms).toFixed(1)},${y(last).toFixed(1)}`, `${x(ms).toFixed(1)},${y(hosts).toFixed(1)}`);
      last = hosts;
    }
    path.push(`${x(to).toFixed(1)},${y(last).toFixed(1)}`);
    const more = { class: `series series-${at % 6}`, "stroke-dasharray": DASHES[at % 6], points: path.join(" ") };
    return svg("polyline", more, svg("title", {}, visible(label)));
  };
  const text = (at, top, words, anchor) => svg("text", { x: at, y: top, "text-anchor": anchor }, words);
  const days = daysBetween(from, to);
  const words = series.map(({ label, points }) => `${visible(label)}: ${points.at(-1)?.[1] ?? 0} hosts now`).join("; ");
  const grid = [0, most / 2, most].map((hosts) => svg("line", { class: "axis", x1: left, x2: width - right, y1: y(hosts), y2: y(hosts) }));
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words || "nothing" },
    ...grid,
    text(left - 6, y(0), "0", "end"),
    text(left - 6, y(most) + 8, most.toLocaleString("en"), "end"),
    ...days.map((ms) => svg("line", { class: "axis", x1: x(ms), x2: x(ms), y1: y(0), y2: y(0) + 5 })),
    ...days.map((ms) => text(x(ms), height - 4, stamp(ms).slice(5, 10), "middle")),
    ...series.map(line),
  );
}

/** Midnights, in UTC, of which there is space for six. */
function daysBetween(from, to) {
  const day = 86_400_000;
  const step = Math.max(1, Math.ceil((to - from) / day / 6)) * day;
  const found = [];
  for (let at = Math.ceil(from / day) * day; at <= to; at += step) found.push(at);
  return found;
}

/** What the lines are: a list with the last number of each. */
export function keyOf(series) {
  const item = ({ label, href, points }, at) => {
    const sample = svg("svg", { viewBox: "0 0 30 10", class: "sample", "aria-hidden": "true" }, svg("line", { class: `series series-${at % 6}`, "stroke-dasharray": DASHES[at % 6], x1: 0, x2: 30, y1: 5, y2: 5 }));
    return element("li", {}, sample, " ", element("a", { href }, name(label)), ` ${(points.at(-1)?.[1] ?? 0).toLocaleString("en")}`);
  };
  return element("ul", { class: "series-key" }, ...series.map(item));
}
