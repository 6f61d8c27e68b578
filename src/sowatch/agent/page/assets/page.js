// Puts the page together: events go into tables and charts, what is chosen stands in the address.

import { drawRates, drawSharers } from "./charts.js";
import { ask, explanation, explanationOf, libraryFacts, processFacts } from "./details.js";
import { follow } from "./feed.js";
import { Table } from "./table.js";
import { element, name, orDash, shortId, since, visible } from "./text.js";

const at = (id) => document.getElementById(id);
const link = (hash, text) => element("a", { href: hash, title: visible(String(text)) }, name(text));
const badge = (text) => (text ? element("span", { class: "badge" }, text) : "");

const VIEWS = {
  libraries: {
    order: "holders",
    isDown: true,
    // All that a search covers; names are searched as they are shown, too.
    words: (row) => [row.path, visible(row.path), row.build_id, row.soname, ...row.containers],
    isStale: (row) => row.stale !== null,
    columns: [
      { key: "path", title: "Path", className: "wide", cell: (row) => link(`#library=${row.number}`, row.path), order: (row) => row.path },
      { key: "holders", title: "Processes", className: "number", descends: true, cell: (row) => String(row.holders.length), order: (row) => row.holders.length },
      { key: "calls", title: "Calls", className: "number less", descends: true, cell: (row) => inventory.callsOf(row.number)?.toLocaleString("en") ?? "", order: (row) => inventory.callsOf(row.number) ?? -1 },
      { key: "containers", title: "Containers", className: "number less", descends: true, cell: (row) => String(row.containers.length), order: (row) => row.containers.length },
      { key: "stale", title: "Stale", className: "short", descends: true, cell: (row) => badge(row.stale), order: (row) => row.stale ?? "" },
      { key: "since", title: "Since", className: "short less", cell: (row) => since(row), order: (row) => -row.since_ms },
      { key: "build_id", title: "Build id", className: "id least", cell: (row) => element("span", { title: orDash(row.build_id) }, shortId(row.build_id)), order: (row) => row.build_id ?? "" },
    ],
  },
  processes: {
    order: "libraries",
    isDown: true,
    words: (row) => [String(row.pid), row.comm, row.exe, row.exe && visible(row.exe), row.container, row.cgroup],
    isStale: (row) => row.stale_libraries > 0,
    columns: [
      { key: "pid", title: "PID", className: "number", cell: (row) => link(`#process=${row.number}`, row.pid), order: (row) => row.pid },
      { key: "comm", title: "Name", className: "short", cell: (row) => name(row.comm), order: (row) => row.comm ?? "" },
      { key: "libraries", title: "Libraries", className: "number", descends: true, cell: (row) => String(row.libraries), order: (row) => row.libraries },
      { key: "stale", title: "Stale", className: "number", descends: true, cell: (row) => badge(row.stale_libraries ? String(row.stale_libraries) : ""), order: (row) => row.stale_libraries },
      { key: "container", title: "Container", className: "id less", cell: (row) => shortId(row.container), order: (row) => row.container ?? "" },
      { key: "since", title: "Since", className: "short less", cell: (row) => since(row), order: (row) => -row.since_ms },
      { key: "exe", title: "Program", className: "wide least", cell: (row) => name(row.exe), order: (row) => row.exe ?? "" },
    ],
  },
};

let inventory = null;
let view = "";
let table = null;
let asked = "";

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

function showRows() {
  const { words, isStale } = VIEWS[view];
  const wanted = at("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const onlyStale = at("only-stale").checked;
  const rows = [...inventory[view].values()].filter((row) => {
    if (onlyStale && !isStale(row)) return false;
    if (!wanted.length) return true;
    const text = words(row).filter(Boolean).join("\n").toLowerCase();
    return wanted.every((word) => text.includes(word));
  });
  at("found").textContent = `${rows.length} of ${inventory[view].size}`;
  table.show(rows);
}

function showView(wanted) {
  if (view !== wanted) {
    view = wanted;
    table = new Table(at("table"), VIEWS[view].columns, { label: view, order: VIEWS[view].order, isDown: VIEWS[view].isDown });
    for (const each of Object.keys(VIEWS)) {
      if (each === view) at(`show-${each}`).setAttribute("aria-current", "page");
      else at(`show-${each}`).removeAttribute("aria-current");
    }
  }
  if (inventory) showRows();
}

// What the address says is shown: #libraries, #processes, #library=7, #process=7, #why=1234.
function showAddress() {
  const [what, value] = splitHash();
  if (what in VIEWS || !view) showView(what in VIEWS ? what : what === "process" ? "processes" : "libraries");
  const dialog = at("details");
  if (["library", "process", "why"].includes(what) && value) {
    showDetails(what, value);
    if (!dialog.open) dialog.showModal();
  } else if (dialog.open) {
    dialog.close();
  }
}

function splitHash() {
  const hash = location.hash.slice(1);
  const cut = hash.indexOf("=");
  return cut < 0 ? [hash, ""] : [hash.slice(0, cut), hash.slice(cut + 1)];
}

function showDetails(what, value) {
  if (what === "why") {
    if (asked !== location.hash) showWhy(decodeURIComponent(value));
    return;
  }
  const row = inventory?.[what === "library" ? "libraries" : "processes"].get(Number(value));
  const isNew = asked !== location.hash;
  if (isNew) at("details-body").replaceChildren(element("div", { id: "facts" }), element("div", { id: "explained" }));
  if (!row) {
    at("details-title").textContent = what === "library" ? "This library is mapped by nobody now" : "This process has ended";
    return;
  }
  at("details-title").replaceChildren(name(what === "library" ? row.path.slice(row.path.lastIndexOf("/") + 1) : `${row.pid} ${row.comm ?? ""}`));
  const shown = what === "library" ? libraryFacts(row, inventory) : processFacts(row, inventory);
  at("facts").replaceChildren(...shown.filter(Boolean));
  if (!isNew) return;
  asked = location.hash;
  const pid = what === "process" ? row.pid : inventory.processes.get(row.holders[0])?.pid;
  const explain = (report) => (what === "process" ? explanation(report) : explanationOf(report, row));
  if (pid !== undefined) answer(at("explained"), String(pid), what === "library" ? `Why process ${pid} is covered with it` : "Why, file by file", explain);
}

function showWhy(target) {
  asked = location.hash;
  at("details-title").replaceChildren(name(target));
  at("details-body").replaceChildren(element("div", { id: "explained" }));
  answer(at("explained"), target, "", explanation);
}

async function answer(place, target, title, explain) {
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
  drawSharers(at("sharers"), [...inventory.libraries.values()]);
  showRows();
  if (at("details").open) showDetails(...splitHash());
}

follow({
  state: showState,
  changed(latest) {
    const isFirst = inventory === null;
    inventory = latest;
    showState("live");
    if (isFirst) showAddress();
    // A page in the background draws nothing until it is shown.
    if (!isDue) requestAnimationFrame(redraw);
    isDue = true;
  },
});

addEventListener("hashchange", showAddress);
at("search").addEventListener("input", () => inventory && showRows());
at("only-stale").addEventListener("change", () => inventory && showRows());
at("close").addEventListener("click", () => at("details").close());
at("details").addEventListener("close", () => {
  asked = "";
  if (!(splitHash()[0] in VIEWS)) location.hash = view;
});
at("why").addEventListener("submit", (event) => {
  event.preventDefault();
  const target = at("target").value.trim();
  if (target) location.hash = `why=${encodeURIComponent(target)}`;
});
showAddress();
