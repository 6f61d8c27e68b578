// The tables of libraries and processes: columns, what a search covers, and the links to each row.

import { address } from "./address.js";
import { hitNodes, marked } from "./search.js";
import { element, name, orDash, shortId, since, visible } from "./text.js";

/** Of a base name that is longer than both, a small page shows so many letters of its beginning and of its end. */
const BEGIN = 30;
const END = 18;

const badge = (text) => (text ? element("span", { class: "badge" }, text) : "");
const TICK_NS = 1e7; // start_ns is the kernel's; all strategies agree on it to the tick

/** The name without its directories, as it is shown. */
export const baseName = (path) => visible(path.slice(path.lastIndexOf("/") + 1));

/** A path, of which a page that has no space for all shows the base name. */
export function pathNodes(path, words = []) {
  const text = visible(path);
  return cutNodes(text, text.lastIndexOf("/") + 1, words);
}

/** `text`, visible already, of which a small page shows what stands from `base` on. */
export function cutNodes(text, base, words = []) {
  const isLong = text.length - base > BEGIN + END;
  const [cut, tail] = isLong ? [base + BEGIN, text.length - END] : [text.length, text.length];
  const part = (className, from, to) => (from < to ? [element("span", { class: className }, ...marked(text, words, from, to))] : []);
  return element(
    "bdi",
    { dir: "ltr", class: "name path" },
    ...part("dir", 0, base),
    element("span", { class: "base" }, ...part(isLong ? "cut" : "whole", base, cut), ...part("middle", cut, tail), ...part("whole", tail, text.length)),
  );
}

const fileOf = (row) => [row.dev, row.inode, row.generation ?? "", row.subvol ?? ""].join("/");
const nameAndBuild = (row) => `${row.build_id ?? ""} ${row.path}`;
const startTicks = (row) => Math.floor(row.start_ns / TICK_NS);

/**
 * Links to rows, and rows by what a link says. A library is its path and build id; its file's number is added where
 * several rows have both. A process is its pid and, in ticks since boot as in /proc/PID/stat, its start.
 */
export class Links {
  #inventory;
  #counts;
  #version;

  constructor(inventory) {
    this.#inventory = inventory;
  }

  library(row) {
    const more = { build_id: row.build_id, file: this.#isShared(row) ? fileOf(row) : null };
    return address("library", row.path, more);
  }

  process(row) {
    return address("process", row.pid, { start: startTicks(row) });
  }

  /** `{ row, others }`: the row that is meant, or undefined; and those of the same path or build id. */
  find({ what, value, more }) {
    return what === "process" ? this.#findProcess(value, more) : this.#findLibrary(value, more);
  }

  #findProcess(value, more) {
    const all = [...this.#inventory.processes.values()].filter((row) => row.pid === Number(value));
    const row = all.find((one) => !more.has("start") || startTicks(one) === Number(more.get("start")));
    return { row, others: all.filter((one) => one !== row) };
  }

  #findLibrary(path, more) {
    const [buildId, file] = [more.get("build_id"), more.get("file")];
    const all = [...this.#inventory.libraries.values()].filter((one) => one.path === path || (buildId && one.build_id === buildId));
    const exact = all.filter((one) => (!path || one.path === path) && (!buildId || one.build_id === buildId));
    const row = exact.find((one) => fileOf(one) === file) ?? exact[0];
    return { row, others: all.filter((one) => one !== row) };
  }

  #isShared(row) {
    if (this.#version !== this.#inventory.version) {
      this.#counts = new Map();
      for (const one of this.#inventory.libraries.values()) this.#counts.set(nameAndBuild(one), (this.#counts.get(nameAndBuild(one)) ?? 0) + 1);
      this.#version = this.#inventory.version;
    }
    return this.#counts.get(nameAndBuild(row)) > 1;
  }
}

/** What the search of libraries and of processes covers, first what a row is shown as. */
const libraryFields = (row) => [
  ["path", row.path],
  ["soname", row.soname],
  ["build id", row.build_id],
  ...row.containers.map((container) => ["container", container]),
];
const processFields = (row) => [
  ["name", row.comm],
  ["PID", String(row.pid)],
  ["program", row.exe],
  ["user", userOf(row)],
  ["unit", row.unit],
  ["container", row.container],
  ["pod", podOf(row)],
  ["cgroup", row.cgroup],
];

/** Namespace, pod and container by their names, as far as they are known, or the uid of the pod; null outside pods. */
export const podOf = (row) => {
  if (!row.pod) return null;
  return row.pod.name ? [row.pod.namespace, row.pod.name, row.pod.container_name].filter(Boolean).join("/") : row.pod.pod_uid;
};

/** The user's name and number; the number only where the host has no name for it. */
export const userOf = (row) => (row.user ? `${row.user} (${row.uid})` : row.uid === null ? null : String(row.uid));

/** A link that is read out as `title`, whatever parts it is shown in. */
const link = (href, title, ...nodes) => element("a", { href, title: visible(String(title)), "aria-label": visible(String(title)) }, ...nodes);

/** Views by name. `hits(row)` and `words()` are those of the search, `calls(row)` what rules count. */
export function views(links, { hits, words, calls }) {
  return {
    libraries: {
      order: "users",
      isDown: true,
      fields: libraryFields,
      only: { title: "only stale", holds: (row) => row.stale !== null },
      placeholder: "path, soname, build id, container",
      columns: [
        { key: "path", title: "Path", className: "wide", cell: (row) => [link(links.library(row), row.path, pathNodes(row.path, words())), ...hitNodes(hits(row), words())], order: (row) => row.path },
        { key: "users", title: "Processes", className: "number", descends: true, cell: (row) => String(row.holders.length), order: (row) => row.holders.length },
        { key: "calls", title: "Calls", className: "number less", descends: true, cell: (row) => calls(row)?.toLocaleString("en") ?? "", order: (row) => calls(row) },
        { key: "containers", title: "Containers", className: "number less", descends: true, cell: (row) => String(row.containers.length), order: (row) => row.containers.length },
        { key: "stale", title: "Stale", className: "short", descends: true, cell: (row) => badge(row.stale), order: (row) => row.stale },
        { key: "since", title: "Since", className: "short less", cell: (row) => since(row), order: (row) => -row.since_ms },
        { key: "build_id", title: "Build id", className: "id least", cell: (row) => element("span", { title: orDash(row.build_id) }, shortId(row.build_id)), order: (row) => row.build_id },
      ],
    },
    processes: {
      order: "libraries",
      isDown: true,
      fields: processFields,
      only: { title: "only stale", holds: (row) => row.stale_libraries > 0 },
      placeholder: "name, PID, program, user, unit, container, pod",
      columns: [
        { key: "pid", title: "PID", className: "number", cell: (row) => link(links.process(row), row.pid, String(row.pid)), order: (row) => row.pid },
        { key: "comm", title: "Name", className: "wide", cell: (row) => [element("bdi", { dir: "ltr", class: "name" }, ...marked(orDash(row.comm), words())), ...hitNodes(hits(row), words())], order: (row) => row.comm },
        { key: "libraries", title: "Libraries", className: "number", descends: true, cell: (row) => String(row.libraries), order: (row) => row.libraries },
        { key: "stale", title: "Stale", className: "number", descends: true, cell: (row) => badge(row.stale_libraries ? String(row.stale_libraries) : ""), order: (row) => row.stale_libraries },
        { key: "user", title: "User", className: "short less", cell: (row) => name(row.user ?? row.uid), order: (row) => row.user ?? row.uid },
        { key: "unit", title: "Unit", className: "unit less", cell: (row) => element("span", { title: orDash(row.unit) }, name(row.unit)), order: (row) => row.unit },
        { key: "container", title: "Container", className: "id least", cell: (row) => (row.pod?.name ? element("span", { title: visible(podOf(row)) }, name(row.pod.name)) : shortId(row.container)), order: (row) => podOf(row) ?? row.container },
        { key: "since", title: "Since", className: "short least", cell: (row) => since(row), order: (row) => -row.since_ms },
        { key: "exe", title: "Program", className: "wide least", cell: (row) => element("span", { title: orDash(row.exe) }, row.exe === null ? "–" : pathNodes(row.exe)), order: (row) => row.exe },
      ],
    },
  };
}

/** What a name may mean to `explain`: libraries of this base name or soname, processes of this name. Each once. */
export function meanings(text, inventory) {
  const found = new Map();
  for (const row of inventory.libraries.values()) {
    if (row.soname === text || row.path.slice(row.path.lastIndexOf("/") + 1) === text) found.set(row.host_path ?? row.path, row);
  }
  for (const row of inventory.processes.values()) if (row.comm === text) found.set(String(row.pid), row);
  return [...found].map(([target, row]) => ({ target, row }));
}
