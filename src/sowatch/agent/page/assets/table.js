// A table of any length that holds only the rows in sight, so that thousands of them stay fluid.

import { element } from "./text.js";

const ROW_PX = 30; // as in page.css
const SPARE_ROWS = 10;

/**
 * columns: { key, title, cell(row) -> Node or text, order(row) -> what is sorted by, className, descends }
 * Rows carry `number`. `sorted(key, isDown)` is called when a head is used.
 */
export class Table {
  #columns;
  #rows = [];
  #sorted = null;
  #parts;
  #drawn = "";
  #isPressed = false;
  #isOwed = false;

  constructor(place, columns, { label, order, isDown }) {
    this.#columns = columns;
    this.order = order;
    this.isDown = isDown;
    const heads = columns.map((column) => this.#head(column));
    this.#parts = {
      heads,
      table: element("table", { "aria-label": label }),
      body: element("tbody"),
      above: element("tr", { "aria-hidden": "true" }, element("td", { colspan: columns.length })),
      below: element("tr", { "aria-hidden": "true" }, element("td", { colspan: columns.length })),
      scroller: element("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": label }),
    };
    const { table, body, scroller } = this.#parts;
    table.append(element("thead", {}, element("tr", { "aria-rowindex": 1 }, ...heads)), body);
    scroller.append(table);
    scroller.addEventListener("scroll", () => requestAnimationFrame(() => this.#draw()));
    body.addEventListener("pointerdown", () => this.#press());
    new ResizeObserver(() => this.#draw()).observe(scroller);
    place.replaceChildren(scroller);
    this.#markOrder();
  }

  /** Shows these rows, in the order chosen. */
  show(rows) {
    this.#rows = rows;
    this.#sorted = null;
    this.#draw(true);
  }

  #head(column) {
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      this.isDown = this.order === column.key ? !this.isDown : Boolean(column.descends);
      this.order = column.key;
      this.#markOrder();
      this.#sorted = null;
      this.#draw(true);
    });
    return element("th", { scope: "col", class: column.className, "data-key": column.key }, button);
  }

  #markOrder() {
    for (const head of this.#parts.heads) {
      const isChosen = head.dataset.key === this.order;
      head.setAttribute("aria-sort", isChosen ? (this.isDown ? "descending" : "ascending") : "none");
    }
  }

  #inOrder() {
    if (!this.#sorted) {
      const { order } = this.#columns.find((column) => column.key === this.order);
      const sign = this.isDown ? -1 : 1;
      const keyed = this.#rows.map((row) => [order(row), row]);
      keyed.sort(([a, one], [b, other]) => sign * (a < b ? -1 : a > b ? 1 : 0) || one.number - other.number);
      this.#sorted = keyed.map(([, row]) => row);
    }
    return this.#sorted;
  }

  // Of a button that is pressed on one element and let go on its successor the browser makes no click.
  #press() {
    this.#isPressed = true;
    const release = () => {
      for (const end of ["pointerup", "pointercancel"]) removeEventListener(end, release);
      // Once the click has got to where it belongs.
      setTimeout(() => {
        this.#isPressed = false;
        if (this.#isOwed) this.#draw(true);
      });
    };
    for (const end of ["pointerup", "pointercancel"]) addEventListener(end, release);
  }

  #draw(isNew = false) {
    if (this.#isPressed) {
      this.#isOwed = true;
      return;
    }
    this.#isOwed = false;
    const { scroller, table, body, above, below } = this.#parts;
    const rows = this.#inOrder();
    const first = Math.max(0, Math.min(rows.length, Math.floor(scroller.scrollTop / ROW_PX)) - SPARE_ROWS);
    const last = Math.min(rows.length, first + Math.ceil(scroller.clientHeight / ROW_PX) + 2 * SPARE_ROWS);
    const drawn = `${first} ${last}`;
    if (!isNew && drawn === this.#drawn) return;
    this.#drawn = drawn;
    const focused = body.contains(document.activeElement) ? document.activeElement.closest("tr").dataset.number : null;
    table.setAttribute("aria-rowcount", rows.length + 1);
    above.firstChild.style.height = `${first * ROW_PX}px`;
    below.firstChild.style.height = `${(rows.length - last) * ROW_PX}px`;
    body.replaceChildren(above, ...rows.slice(first, last).map((row, at) => this.#row(row, first + at)), below);
    above.hidden = first === 0;
    below.hidden = last === rows.length;
    if (focused) body.querySelector(`tr[data-number="${focused}"] a`)?.focus({ preventScroll: true });
  }

  #row(row, at) {
    const cells = this.#columns.map((column) => element("td", { class: column.className }, column.cell(row)));
    return element("tr", { "aria-rowindex": at + 2, "data-number": row.number }, ...cells);
  }
}
