// Puts the page together: events go into tables and charts, what is chosen stands in the address.

import { address, parsed } from "./address.js";
import { drawRates, drawSharers } from "./charts.js";
import { ask, choices, explanation, explanationOf, facts, forgetLists, isBuildId, libraryFacts, list, missing, processFacts } from "./details.js";
import { follow } from "./feed.js";
import { aboutHttp, endpointFacts, flowsTable, HttpTab, titleOf, VIEW } from "./http.js";
import { patch, whilePressed } from "./patch.js";
import { matches, wordsOf } from "./search.js";
import { aboutStale, StaleTab, staleView } from "./stale.js";
import { Table } from "./table.js";
import { element, name, orDash, visible } from "./text.js";
import { baseName, Links, meanings, views } from "./views.js";

const at = (id) => document.getElementById(id);

/** What the dialog shows; all else in the address is a view. */
const DETAILS = ["library", "process", "endpoint", "flows", "why"];

let inventory = null;
let links = null;
let view = "";
let table = null;
/** The addresses that the dialog was made for, and that the agent was asked about. */
let drawn = "";
let asked = "";
let hits = new Map();
let words = [];

// What is asked for while its tab is shown, and what stands above the table there.
const http = new HttpTab(renewTab);
const TABS = { http: { source: http, about: aboutHttp }, stale: { source: new StaleTab(renewTab), about: aboutStale } };

// Rows may be asked for before the agent has sent what is mapped.
const linked = { library: (row) => links?.library(row) ?? "#", process: (row) => links?.process(row) ?? "#" };
const searched = { hits: (row) => hits.get(row) ?? [], words: () => words };
const VIEWS = {
  ...views(linked, { ...searched, calls: (row) => inventory.callsOf(row.number) }),
  stale: staleView(linked, searched),
  http: VIEW,
};

function renewTab() {
  showAbout();
  if (view in TABS) showRows();
  if (at("details").open) showDetails();
}

const total = (title, value, className) => element("div", { class: className }, element("dt", {}, title), element("dd", {}, String(value)));

function showTotals() {
  const { status, libraries, processes } = inventory;
  const lost = status.lost_kernel + status.lost_queue;
  at("host").textContent = orDash(status.host);
  at("totals").replaceChildren(
    total("libraries", libraries.size),
    total("processes", processes.size),
    total("mappings", status.mappings),
    total("loads", status.loads),
    total("lost", status.repaired ? lost : `${lost}, being repaired`, lost ? "warning" : ""),
    total("strategy", `${orDash(status.strategy)}, ${orDash(status.guarantee)}`),
    ...(status.left_out ? [total("mappings not shown", status.left_out, "warning")] : []),
  );
}

const rowsOf = () => TABS[view]?.source.rows() ?? [...(inventory?.[view].values() ?? [])];

function showRows() {
  const { fields, only } = VIEWS[view];
  const rows = rowsOf();
  const isNarrowed = at("only").checked;
  words = wordsOf(at("search").value);
  hits = new Map();
  const found = rows.filter((row) => {
    if (isNarrowed && !only.holds(row)) return false;
    const hit = matches(fields(row), words);
    if (hit?.length) hits.set(row, hit);
    return hit !== null;
  });
  at("found").textContent = `${found.length} of ${rows.length}`;
  at("table").classList.toggle("searched", hits.size > 0);
  table.show(found);
}

function showAbout() {
  at("about").hidden = !(view in TABS);
  if (view in TABS) patch(at("about"), TABS[view].about(TABS[view].source));
}

function showView(wanted) {
  if (view !== wanted) {
    view = wanted;
    const { columns, order, isDown, only, placeholder } = VIEWS[view];
    table = new Table(at("table"), columns, { label: view, order, isDown, keyOf: (row) => row.key ?? row.number });
    at("only-title").textContent = only.title;
    at("search").placeholder = placeholder;
    at("charts").hidden = view in TABS;
    for (const each of Object.keys(VIEWS)) {
      if (each === view) at(`show-${each}`).setAttribute("aria-current", "page");
      else at(`show-${each}`).removeAttribute("aria-current");
    }
    showAbout();
    for (const [each, { source }] of Object.entries(TABS)) source.show(each === view);
  }
  showRows();
}

// ---- the address: #libraries&search=ssl, #library=/usr/lib/x.so&build_id=…, #process=7&start=…, #why=1234 ------------

const viewAddress = () => address(view, null, { search: at("search").value.trim(), only: at("only").checked ? "1" : null });
const VIEW_OF = { process: "processes", endpoint: "http", flows: "http" };

function showAddress() {
  const { what, more } = parsed(location.hash);
  if (what in VIEWS && more.has("search")) at("search").value = visible(more.get("search"));
  if (what in VIEWS && more.has("only")) at("only").checked = true;
  if (what in VIEWS || !view) showView(what in VIEWS ? what : (VIEW_OF[what] ?? "libraries"));
  const dialog = at("details");
  if (DETAILS.includes(what)) {
    showDetails();
    if (!dialog.open) dialog.showModal();
  } else if (dialog.open) {
    dialog.close();
  }
}

/** What is searched goes into the address, and not into the history of the browser. */
function search() {
  if (view in VIEWS && !at("details").open) history.replaceState(null, "", viewAddress());
  showRows();
}

// ---- the dialog -----------------------------------------------------------------------------------------------------

const isHeld = whilePressed(at("details"), () => showDetails());

function showDetails() {
  if (isHeld()) return;
  const wanted = parsed(location.hash);
  const isNew = asked !== location.hash;
  if (drawn !== location.hash) {
    drawn = location.hash;
    at("details-body").replaceChildren(element("div", { id: "facts" }), element("div", { id: "explained" }));
    at("details").scrollTop = 0;
    forgetLists();
  }
  if (wanted.what === "why") showWhy(wanted.value, isNew);
  else if (wanted.what === "endpoint" || wanted.what === "flows") showHttp(wanted);
  else if (inventory) showRow(wanted, isNew);
}

const setTitle = (...nodes) => patch(at("details-title"), nodes.map((node) => (typeof node === "string" ? document.createTextNode(node) : node)));

function showRow(wanted, isNew) {
  const isLibrary = wanted.what === "library";
  const { row, others } = links.find(wanted);
  if (!row) {
    setTitle(isLibrary ? "This library is mapped by nobody now" : "This process has ended");
    patch(at("facts"), missing(wanted.what, others, links));
    return;
  }
  setTitle(name(isLibrary ? row.path.slice(row.path.lastIndexOf("/") + 1) : `${row.pid} ${row.comm ?? ""}`));
  patch(at("facts"), isLibrary ? libraryFacts(row, others, inventory, links) : processFacts(row, inventory, links));
  if (!isNew) return;
  asked = location.hash;
  const pid = isLibrary ? inventory.processes.get(row.holders[0])?.pid : row.pid;
  const explain = (report) => (isLibrary ? explanationOf(report, row) : explanation(report));
  if (pid !== undefined) answer(String(pid), isLibrary ? `Why process ${pid} is covered with it` : "Why, file by file", explain);
}

function showHttp(wanted) {
  const row = wanted.what === "endpoint" ? http.row(wanted) : null;
  const parts = { facts, list, processLink: flowProcess };
  setTitle(wanted.what === "flows" ? "The last flows" : name(row ? titleOf(row) : wanted.value));
  if (!http.report) patch(at("facts"), aboutHttp(http));
  else if (wanted.what === "flows") patch(at("facts"), flowsTable(http.report.flows, parts));
  else if (row) patch(at("facts"), endpointFacts(row, http.report, parts));
  else patch(at("facts"), [element("p", {}, "No flow of this endpoint was counted since [http] was turned on, or others have more.")]);
}

const flowProcess = (process) => element("a", { href: linked.process(process) }, name(`${process.comm ?? ""} ${process.pid}`));

function showWhy(target, isNew) {
  if (!isNew) return;
  setTitle(name(target));
  // A name is looked up in what is mapped, which has to be there first.
  const isName = !/^(\d+$|\/)/.test(target) && !isBuildId(target);
  if (isName && !inventory) return;
  asked = location.hash;
  const found = isName ? meanings(target, inventory) : [{ target }];
  if (found.length === 1) {
    answer(found[0].target, isName ? baseName(found[0].target) : "", explanation);
  } else if (found.length) {
    patch(at("explained"), choices(found));
  } else {
    const words = "No library that is mapped and no process has this name. Of a file that nobody has mapped, give the whole path.";
    patch(at("explained"), [element("p", { class: "warning", role: "alert" }, words)]);
  }
}

async function answer(target, title, explain) {
  const place = at("explained");
  place.replaceChildren(element("p", { role: "status" }, "asking the agent …"));
  let parts;
  try {
    parts = explain(await ask(target));
  } catch (error) {
    parts = [element("p", { class: "warning", role: "alert" }, visible(error.message))];
  }
  place.replaceChildren(...(title ? [element("h3", {}, title)] : []), ...parts);
}

function showState(word) {
  const losing = word === "live" && inventory && !inventory.status.repaired;
  const shown = losing ? "live, repairing losses" : word;
  const state = at("state");
  if (state.textContent !== shown) state.textContent = shown;
  state.dataset.state = losing ? "losing" : word;
}

let isDue = false;
function redraw() {
  isDue = false;
  showTotals();
  drawRates(at("rates"), inventory.seconds);
  drawSharers(at("sharers"), [...inventory.libraries.values()], links);
  if (!(view in TABS)) showRows();
  if (at("details").open) showDetails();
}

follow({
  state: showState,
  changed(latest) {
    const isFirst = inventory === null;
    inventory = latest;
    links ??= new Links(inventory);
    showState("live");
    if (isFirst) showAddress();
    // A page in the background draws nothing until it is shown.
    if (!isDue) requestAnimationFrame(redraw);
    isDue = true;
  },
});

// ---- the keyboard ---------------------------------------------------------------------------------------------------

/** Keys that go through the rows, by how far. */
const STEPS = { ArrowDown: () => 1, ArrowUp: () => -1, PageDown: () => table.page, PageUp: () => -table.page, Home: () => -Infinity, End: () => Infinity };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
  const { key, target } = event;
  const isTyped = target.matches("input:not([type=checkbox])");
  const isSearch = target === at("search");
  if (at("details").open) {
    if (!isTyped && (key === "ArrowDown" || key === "ArrowUp") && goInDialog(key === "ArrowDown" ? 1 : -1)) event.preventDefault();
  } else if (key === "/" && !isTyped) {
    event.preventDefault();
    at("search").select();
  } else if (key in STEPS && (key.startsWith("Arrow") ? !isTyped || isSearch : at("table").contains(target))) {
    event.preventDefault();
    table.move(STEPS[key]());
  } else if (key === "Escape") {
    event.preventDefault();
    if (at("search").value) {
      at("search").value = "";
      search();
    } else if (isTyped && !table.focus()) {
      target.blur();
    }
  }
});

/** To the next or the previous of what can be chosen in the dialog. */
function goInDialog(step) {
  const all = [...at("details").querySelectorAll("a, button:not([hidden]), summary")];
  const next = all[all.indexOf(document.activeElement) + step];
  next?.focus();
  return Boolean(next);
}

addEventListener("hashchange", showAddress);
at("search").addEventListener("input", search);
at("only").addEventListener("change", search);
at("close").addEventListener("click", () => at("details").close());
at("details").addEventListener("close", () => {
  asked = drawn = "";
  if (!(parsed(location.hash).what in VIEWS)) location.hash = viewAddress();
  table.focus();
});
at("why").addEventListener("submit", (event) => {
  event.preventDefault();
  const target = at("target").value.trim();
  if (target) location.hash = address("why", target);
});
showAddress();
