// A table of any length that holds only the rows in sight, so that thousands of them stay fluid.

import { whilePressed } from "./patch.js";
import { element } from "./text.js";

const SPARE_ROWS = 10;

/**
 * columns: { key, title, cell(row) -> Node, text or several, order(row) -> what is sorted by (null: last), className,
 * descends }. The first link of a row is what the keyboard goes to. `keyOf(row)` names a row from one time to the next.
 */
export class Table {
  #columns;
  #keyOf;
  #rows = [];
  #sorted = null;
  #parts;
  #drawn = "";
  #isPressed;
  // The row that the keyboard is at: its key, and its place if it has gone meanwhile.
  #current = null;
  #place = -1;

  constructor(place, columns, { label, order, isDown, keyOf }) {
    this.#columns = columns;
    this.#keyOf = keyOf;
    this.order = order;
    this.isDown = isDown;
    const heads = columns.map((column) => this.#head(column));
    this.#parts = {
      heads,
      table: element("table", { "aria-label": label }),
      body: element("tbody"),
      // One cell: more would be columns of their own where a small page hides some.
      above: element("tr", { "aria-hidden": "true" }, element("td")),
      below: element("tr", { "aria-hidden": "true" }, element("td")),
      scroller: element("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": label }),
    };
    const { table, body, scroller } = this.#parts;
    table.append(element("thead", {}, element("tr", { "aria-rowindex": 1 }, ...heads)), body);
    scroller.append(table);
    scroller.addEventListener("scroll", () => requestAnimationFrame(() => this.#draw()));
    body.addEventListener("focusin", (event) => this.#enter(event.target.closest("tr")));
    this.#isPressed = whilePressed(body, () => this.#draw(true));
    new ResizeObserver(() => this.#draw(true)).observe(scroller);
    place.replaceChildren(scroller);
    this.#markOrder();
  }

  /** Shows these rows, in the order chosen. */
  show(rows) {
    this.#rows = rows;
    this.#sorted = null;
    this.#draw(true);
  }

  /** Goes so many rows on or back, into the table from anywhere else; Infinity is its end. */
  move(step) {
    const rows = this.#inOrder();
    if (!rows.length) return;
    const found = rows.findIndex((row) => String(this.#keyOf(row)) === this.#current);
    const from = found < 0 ? Math.min(this.#place, rows.length - 1) : found;
    const to = Math.max(0, Math.min(rows.length - 1, (from < 0 && step > 0 ? -1 : from) + step));
    this.#reach(rows, to);
  }

  /** How many rows are in sight, which is what a page of them is. */
  get page() {
    return Math.max(1, Math.floor(this.#parts.scroller.clientHeight / this.#height()) - 2);
  }

  /** Back to the row that the keyboard was at; whether there is one. */
  focus() {
    const rows = this.#inOrder();
    const at = rows.findIndex((row) => String(this.#keyOf(row)) === this.#current);
    if (at >= 0) this.#reach(rows, at);
    return at >= 0;
  }

  #reach(rows, at) {
    const { scroller, table } = this.#parts;
    const [height, head] = [this.#height(), table.tHead.offsetHeight];
    const top = at * height;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (top + height > scroller.scrollTop + scroller.clientHeight - head) scroller.scrollTop = top + height + head - scroller.clientHeight;
    const key = String(this.#keyOf(rows[at]));
    // Which gives the focus back to where it was.
    this.#draw(true);
    this.#linkOf(key)?.focus({ preventScroll: true });
    scroller.scrollIntoView({ block: "nearest" });
  }

  #enter(row) {
    if (!row?.dataset.row) return;
    this.#current = row.dataset.row;
    this.#place = Number(row.getAttribute("aria-rowindex")) - 2;
  }

  #linkOf(key) {
    return this.#parts.body.querySelector(`tr[data-row="${CSS.escape(key)}"] a`);
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
      const keyed = this.#rows.map((row) => [order(row) ?? null, this.#keyOf(row), row]);
      keyed.sort(([a, one], [b, other]) => (a === null) - (b === null) || sign * compared(a, b) || compared(one, other));
      this.#sorted = keyed.map(([, , row]) => row);
    }
    return this.#sorted;
  }

  // As in page.css: on a small page rows are higher.
  #height() {
    return parseFloat(getComputedStyle(this.#parts.scroller).getPropertyValue("--row"));
  }

  #draw(isNew = false) {
    if (this.#isPressed()) return;
    const { scroller, table, body, above, below } = this.#parts;
    const rows = this.#inOrder();
    const height = this.#height();
    const first = Math.max(0, Math.min(rows.length, Math.floor(scroller.scrollTop / height)) - SPARE_ROWS);
    const last = Math.min(rows.length, first + Math.ceil(scroller.clientHeight / height) + 2 * SPARE_ROWS);
    const drawn = `${first} ${last}`;
    if (!isNew && drawn === this.#drawn) return;
    this.#drawn = drawn;
    const focused = body.contains(document.activeElement) ? document.activeElement.closest("tr").dataset.row : null;
    table.setAttribute("aria-rowcount", rows.length + 1);
    above.firstChild.style.height = `${first * height}px`;
    below.firstChild.style.height = `${(rows.length - last) * height}px`;
    body.replaceChildren(above, ...rows.slice(first, last).map((row, at) => this.#row(row, first + at)), below);
    above.hidden = first === 0;
    below.hidden = last === rows.length;
    if (focused) this.#linkOf(focused)?.focus({ preventScroll: true });
  }

  #row(row, at) {
    const cells = this.#columns.map(({ className, cell }) => element("td", { class: className }, element("div", {}, ...[cell(row)].flat())));
    return element("tr", { "aria-rowindex": at + 2, "data-row": this.#keyOf(row) }, ...cells);
  }
}

const compared = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
