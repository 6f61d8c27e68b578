// Two charts, drawn as SVG elements: loads over time, and the libraries that most processes share.

import { lasting, visible } from "./text.js";
import { baseName } from "./views.js";

const NAMESPACE = "http://www.w3.org/2000/svg";

function svg(name, attributes, ...children) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const rounded = (value) => (value >= 100 ? Math.round(value) : Math.round(10 * value) / 10);

/** The next 1, 2 or 5 times a power of ten. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, value)));
  return power * [1, 2, 5, 10].find((step) => step * power >= value);
}

/** `seconds`: [time, loads, unloads, lost] each; the newest at the right. Seconds with losses are marked. */
export function drawRates(place, seconds) {
  const [width, height, left, bottom] = [600, 150, 44, 18];
  const span = Math.min(600, Math.max(60, seconds.length));
  const most = ceiling(Math.max(1, ...seconds.map(([, loads, unloads]) => Math.max(loads, unloads))));
  const last = seconds.at(-1) ?? [0, 0, 0, 0];
  const x = (time) => left + ((time - last[0] + span) / span) * (width - left - 4);
  const y = (value) => 6 + (1 - value / most) * (height - bottom - 6);
  const line = (column, name) =>
    svg("polyline", { class: name, points: seconds.map((one) => `${x(one[0]).toFixed(1)},${y(one[column]).toFixed(1)}`).join(" ") });
  const label = (at, height_, text, anchor) => svg("text", { x: at, y: height_, "text-anchor": anchor }, text);
  const losses = seconds.filter((one) => one[3] > 0);
  const words = `now ${rounded(last[1])} loads and ${rounded(last[2])} unloads a second; at most ${rounded(
    Math.max(0, ...seconds.map((one) => one[1])),
  )} loads a second in the last ${lasting(1000 * span)}`;
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words },
    svg("line", { class: "axis", x1: left, x2: width - 4, y1: y(0), y2: y(0) }),
    svg("line", { class: "axis", x1: left, x2: width - 4, y1: y(most), y2: y(most) }),
    label(left - 6, y(0), "0", "end"),
    label(left - 6, y(most) + 8, most.toLocaleString("en"), "end"),
    label(left, height - 4, `${lasting(1000 * span)} ago`, "start"),
    label(width - 4, height - 4, "now", "end"),
    ...losses.map((one) => svg("line", { class: "loss", x1: x(one[0]), x2: x(one[0]), y1: y(most), y2: y(0) })),
    line(2, "unloads"),
    line(1, "loads"),
  );
  const key = document.createElement("p");
  key.className = "key";
  key.textContent = words;
  place.replaceChildren(drawing, key);
}

/** The biggest sharers; each bar is a link to its library. */
export function drawSharers(place, libraries, links) {
  const biggest = libraries.toSorted((a, b) => b.holders.length - a.holders.length || a.number - b.number).slice(0, 8);
  const [width, step, left] = [600, 21, 230];
  const most = Math.max(1, ...biggest.map((row) => row.holders.length));
  const bars = biggest.map((row, at) => {
    const size = (row.holders.length / most) * (width - left - 50);
    const shown = baseName(row.path);
    const short = shown.length > 30 ? `${shown.slice(0, 29)}…` : shown;
    const middle = at * step + step / 2 + 4;
    const bar = svg(
      "a",
      { href: links.library(row) },
      svg("title", {}, visible(row.path)),
      svg("text", { x: left - 6, y: middle, "text-anchor": "end", direction: "ltr" }, short),
      svg("rect", { class: row.stale ? "stale" : "bar", x: left, y: at * step + 3, width: size.toFixed(1), height: step - 6 }),
      svg("text", { x: left + size + 6, y: middle }, String(row.holders.length)),
    );
    return bar;
  });
  const height = Math.max(1, biggest.length) * step;
  place.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group" }, ...bars));
}
