// Puts the page together: the tab that the address names, its answer, and the keyboard.

import { address, parsed } from "./address.js";
import { Asking } from "./answers.js";
import { chartOf, keyOf } from "./chart.js";
import { patch } from "./patch.js";
import { go, show, tableOf } from "./rows.js";
import { element, shortId, visible } from "./text.js";
import { holdsFor, hostFacts, packageOf, verdictOf, VIEWS } from "./views.js";

const at = (id) => document.getElementById(id);
const ROWS = 100;

let tab = "";
let what = "";
let offset = 0;
let total = 0;
/** What was asked last in a tab that takes something, for the other tabs that do. */
let target = "";

const asking = new Asking(({ answer, error }) => {
  showState(error ? "asking again" : "live", error ? "connecting" : "live");
  if (error) showError(error);
  else showAnswer(answer);
});

function showState(word, state) {
  if (at("state").textContent !== word) at("state").textContent = word;
  at("state").dataset.state = state;
}

// ---- the address: #hosts&state=silent&search=web&from=100, #who=libssl.so.3, #host=ID --------------------------------

function showAddress() {
  const found = parsed(location.hash);
  const isHost = found.what === "host";
  const wanted = isHost || found.what in VIEWS ? found.what : "hosts";
  const isNew = wanted !== tab || found.value !== what;
  [tab, what] = [wanted, found.value];
  offset = Math.max(0, Number(found.more.get("from")) || 0);
  if (VIEWS[tab]?.takes) target = what || target;
  const view = isHost ? {} : VIEWS[tab];
  if (document.activeElement !== at("search")) at("search").value = visible(found.more.get("search") ?? "");
  at("state-of").value = found.more.get("state") ?? "";
  at("narrow").hidden = isHost || tab === "time";
  at("search").parentElement.hidden = !view.search;
  at("narrow-title").textContent = view.search ?? "";
  at("choice").hidden = !view.hasState;
  if (VIEWS[tab]?.takes && document.activeElement !== at("what")) at("what").value = visible(what);
  for (const each of Object.keys(VIEWS)) {
    const tabLink = at(`show-${each}`);
    tabLink.href = VIEWS[each].takes ? address(each, target) : address(each);
    if (each === (isHost ? "hosts" : tab)) tabLink.setAttribute("aria-current", "page");
    else tabLink.removeAttribute("aria-current");
  }
  if (isNew) {
    at("shown").dataset.tab = tab;
    at("range").textContent = "";
    at("holds").textContent = "asking the store …";
    at("holds").className = "";
  }
  at("shown").setAttribute("aria-busy", "true");
  askNow();
}

function askNow() {
  const page = { offset, limit: ROWS };
  if (tab === "host") {
    asking.ask("/api/coverage", { host: what });
  } else if (VIEWS[tab].takes && !what) {
    asking.end();
    showHint();
  } else {
    const { path, search, hasState } = VIEWS[tab];
    const query = VIEWS[tab].takes ? { what, days: parsed(location.hash).more.get("days") } : { search: search ? at("search").value : "", state: hasState ? at("state-of").value : "" };
    asking.ask(path, { ...query, ...page });
  }
}

function addressNow(from = 0) {
  const search = VIEWS[tab]?.search ? at("search").value.trim() : "";
  const state = VIEWS[tab]?.hasState ? at("state-of").value : "";
  return address(tab, what || null, { state, search, from: from || null });
}

// ---- what is shown --------------------------------------------------------------------------------------------------

function showHint() {
  showPages(0, 0);
  at("holds").textContent = "";
  at("shown").setAttribute("aria-busy", "false");
  const words = `Give a ${VIEWS[tab].takes} above, or choose one under `;
  patch(at("shown"), [element("p", {}, words, element("a", { href: "#libraries" }, "Libraries"), ".")]);
}

function showError(error) {
  at("holds").textContent = visible(error);
  at("holds").className = "warning";
  at("shown").setAttribute("aria-busy", "false");
}

function showAnswer(answer) {
  const { answer: head } = answer;
  at("shown").setAttribute("aria-busy", "false");
  at("holds").className = "";
  at("holds").textContent = holdsFor(head);
  showTotals(head);
  if (tab === "host") return showHost(answer);
  if (tab === "time") return showTime(answer);
  const { columns, empty } = VIEWS[tab];
  total = answer.total;
  showPages(answer.rows.length, total, answer.is_cut);
  const rows = answer.rows.length ? tableOf(tab, columns, answer.rows) : element("p", {}, offset ? "There are no rows so far on." : empty);
  return show(at("shown"), [...(tab === "who" ? verdictOf(head) : []), rows]);
}

function showHost({ rows }) {
  patch(at("shown"), rows.length ? hostFacts(rows[0]) : [element("p", {}, "No host with this id has sent anything in 30 days.")]);
}

function showTime({ series, from, to, other_builds: others }) {
  const lines = series.map((one) => ({
    label: one.purls.length ? one.purls.map(packageOf).join(", ") : shortId(one.build_id),
    href: address("who", one.build_id),
    points: one.points.map(([time, hosts]) => [Date.parse(time), hosts]),
  }));
  const words = `Hosts with each build mapped, as they reported it. What a host that went silent has is counted until it answers again.`;
  const span = (days) => element("a", { href: address("time", what, { days }) }, `${days} days`);
  const spans = element("p", { class: "spans" }, ...[7, 30, 90].map(span));
  const rest = others ? element("p", { class: "key" }, `${others} other builds, on fewer hosts, are not drawn.`) : null;
  const nodes = lines.length
    ? [element("figure", {}, element("figcaption", {}, words), chartOf(lines, Date.parse(from), Date.parse(to))), keyOf(lines), rest]
    : [element("p", {}, "Nobody is known to have mapped it in this time.")];
  patch(at("shown"), [spans, ...nodes.filter(Boolean)]);
}

function showTotals(head) {
  const part = ([title, value]) => element("div", { class: value && title !== "answered" ? "warning" : null }, element("dt", {}, title), element("dd", {}, value.toLocaleString("en")));
  const { answered, silent, lossy, unsupported } = head.hosts;
  patch(at("totals"), Object.entries({ hosts: answered + silent + lossy + unsupported, answered, silent, lossy, unsupported }).map(([title, value]) => (title === "hosts" ? element("div", {}, element("dt", {}, title), element("dd", {}, value.toLocaleString("en"))) : part([title, value]))));
}

function showPages(shown, all, isCut = false) {
  const last = offset + shown;
  at("range").textContent = shown ? `${(offset + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${isCut ? "more than " : ""}${all.toLocaleString("en")}` : "";
  at("back").disabled = offset === 0;
  at("next").disabled = last >= all;
}

// ---- what a person does ---------------------------------------------------------------------------------------------

let typing = 0;
function narrowed() {
  clearTimeout(typing);
  typing = setTimeout(() => {
    history.replaceState(null, "", addressNow());
    showAddress();
  }, 200);
}

addEventListener("hashchange", showAddress);
at("search").addEventListener("input", narrowed);
at("state-of").addEventListener("change", narrowed);
at("narrow").addEventListener("submit", (event) => event.preventDefault());
at("back").addEventListener("click", () => (location.hash = addressNow(Math.max(0, offset - ROWS))));
at("next").addEventListener("click", () => (location.hash = addressNow(offset + ROWS)));
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const wanted = at("what").value.trim();
  const into = VIEWS[tab]?.takes ? tab : "who";
  if (wanted) location.hash = address(into, wanted);
});

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
  const isTyped = event.target.matches("input, select");
  if (event.key === "/" && !isTyped) {
    event.preventDefault();
    at("what").select();
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && !event.target.matches("select")) {
    if (go(at("shown"), event.key === "ArrowDown" ? 1 : -1)) event.preventDefault();
  } else if (event.key === "Escape" && isTyped) {
    event.preventDefault();
    event.target.blur();
  } else if (event.key === "Escape" && history.length > 1) {
    event.preventDefault();
    history.back();
  }
});
showAddress();
