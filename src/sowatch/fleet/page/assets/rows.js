// A table of one page of rows. On a small screen each row is a card, whose cells have their titles beside them.

import { patch } from "./patch.js";
import { element } from "./text.js";

/** columns: { title, className, cell(row) -> node, text or several }; the first link of a row is what the keyboard goes to. */
export function tableOf(label, columns, rows) {
  const heads = columns.map(({ title, className }) => element("th", { scope: "col", class: className }, title));
  const cell = (row) => (column) => {
    const nodes = [column.cell(row)].flat();
    return element("td", { class: column.className, "data-title": column.title }, element("div", {}, ...nodes));
  };
  const body = rows.map((row) => element("tr", {}, ...columns.map(cell(row))));
  const table = element("table", { "aria-label": label }, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...body));
  return element("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": label }, table);
}

/** Puts `nodes` into `place`. A table of the same columns keeps its place, and what is scrolled and has the focus stays. */
export function show(place, nodes) {
  const scroller = place.querySelector(":scope > .scroller");
  const next = nodes.find((one) => one.classList.contains("scroller"));
  if (scroller && next && scroller.querySelector("thead").isEqualNode(next.querySelector("thead"))) {
    patch(scroller.querySelector("tbody"), [...next.querySelector("tbody").childNodes]);
    next.replaceWith?.();
    const others = nodes.filter((one) => one !== next);
    const at = nodes.indexOf(next);
    const old = [...place.childNodes].filter((one) => one !== scroller);
    old.forEach((one) => one.remove());
    others.forEach((one, index) => (index < at ? scroller.before(one) : place.append(one)));
    return;
  }
  patch(place, nodes);
}

/** From the row that has the focus to the next or the previous one; into the table from elsewhere. */
export function go(place, step) {
  const links = [...place.querySelectorAll("tbody tr")].map((row) => row.querySelector("a")).filter(Boolean);
  const at = links.findIndex((one) => one.closest("tr").contains(document.activeElement));
  const next = links[at < 0 ? (step > 0 ? 0 : -1) : at + step];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
  return Boolean(next);
}
