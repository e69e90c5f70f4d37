// The grid of partitions, the table of the same, and the panel of one of them (/#partition-17).

import { brief, count, counted, duration, seconds } from "./format.js";
import { announce, byId, element, facts, fillTime, list, rows, setAttribute, setHidden, setText } from "./dom.js";

/** Lag from which a cell stands out, in seconds. The promise to the payments' readers is 5 s. */
const LATE_SECONDS = 5;
const VERY_LATE_SECONDS = 60;

const KINDS = [
  { kind: "halted", glyph: "✕", text: "halted", isBad: true },
  { kind: "very-late", glyph: "▲", text: `${VERY_LATE_SECONDS} s or more behind`, isWarning: true },
  { kind: "late", glyph: "△", text: `${LATE_SECONDS} s or more behind`, isWarning: true },
  { kind: "unknown", glyph: "?", text: "lag not known", isWarning: true },
  { kind: "opening", glyph: "…", text: "opening", isWarning: false },
  { kind: "live", glyph: "✓", text: "live", isWarning: false },
];
const BY_KIND = new Map(KINDS.map((kind) => [kind.kind, kind]));

function kindOf(partition) {
  if (partition.state === "halted") return "halted";
  if (partition.state === "opening") return "opening";
  if (partition.state !== "live" || typeof partition.lag_records !== "number") return "unknown";
  if (partition.lag_seconds >= VERY_LATE_SECONDS) return "very-late";
  return partition.lag_seconds >= LATE_SECONDS ? "late" : "live";
}

let state = null;
let selected = null;
let focused = null;

export function start() {
  const grid = byId("grid");
  grid.addEventListener("click", (event) => {
    const cell = event.target.closest("button");
    if (!cell) return;
    const hash = `#partition-${cell.dataset.key}`;
    if (location.hash === hash) close();
    else location.hash = hash;
  });
  grid.addEventListener("keydown", onKey);
  grid.addEventListener("focusin", (event) => {
    if (event.target.dataset.key !== undefined) rove(event.target.dataset.key);
  });
  byId("panel").addEventListener("keydown", (event) => event.key === "Escape" && close());
  byId("panel-close").addEventListener("click", close);
  byId("panel-copy").addEventListener("click", copy);
  byId("partition-table-details").open = false;
  byId("partition-table-details").addEventListener("toggle", () => state && renderTable());
  window.addEventListener("hashchange", () => open(false));
  window.addEventListener("popstate", () => open(false));
}

export function render(newState) {
  const isFirst = state === null;
  state = newState;
  renderGrid();
  renderLegend();
  renderTable();
  if (isFirst) open(true);
  else renderPanel();
}

function number(partition) {
  return partition.partition;
}

function cellLag(partition) {
  if (partition.state === "halted") return "halted";
  if (partition.state === "opening") return "opening";
  return brief(partition.lag_seconds);
}

function renderGrid() {
  const keys = state.partitions.map((partition) => String(partition.partition));
  if (!keys.includes(focused)) focused = keys[0] ?? null;
  list(byId("grid"), state.partitions, number, () => {
    const cell = element("button", "cell");
    cell.type = "button";
    cell.setAttribute("aria-controls", "panel");
    const head = element("span", "cell-head");
    const glyph = element("span", "glyph");
    glyph.setAttribute("aria-hidden", "true");
    head.append(element("span", "number"), glyph);
    cell.append(element("span", "vh", "Partition "), head, element("span", "vh"), element("span", "cell-lag"), element("span", "vh"));
    return cell;
  }, (cell, partition) => {
    const kind = kindOf(partition);
    const key = String(partition.partition);
    setAttribute(cell, "data-kind", kind);
    const [, head, stateText, lagText, records] = cell.children;
    setText(head.firstChild, key);
    setText(head.lastChild, BY_KIND.get(kind).glyph);
    // The visible text is a part of what a screen reader says.
    setText(stateText, partition.state === "live" ? ", live, oldest waiting record " : ", ");
    setText(lagText, cellLag(partition));
    setText(records, `${partition.halted ? `, ${partition.halted.reason}` : ""}, ${counted(partition.lag_records, "record")} behind`);
    setAttribute(cell, "aria-expanded", String(key === selected));
    setAttribute(cell, "tabindex", key === focused ? "0" : "-1");
  });
  const others = state.peers.filter((peer) => peer.error !== null).map((peer) => peer.address);
  const note = byId("partitions-note");
  setHidden(note, others.length === 0);
  setText(note, `Partitions of ${others.join(", ")} are missing here: see Other instances.`);
  setText(byId("partitions-count"), keys.length === 0 ? "None is assigned to this instance yet."
    : `${counted(keys.length, "partition")}${state.peers.length > 0 ? " of all instances that answer" : " of this instance"}`);
}

function renderLegend() {
  const counts = new Map();
  for (const partition of state.partitions) {
    const kind = kindOf(partition);
    counts.set(kind, [...(counts.get(kind) ?? []), partition.partition]);
  }
  list(byId("legend"), KINDS, (kind) => kind.kind, (kind) => {
    const node = element("span", "legend-entry");
    const glyph = element("span", "legend-glyph", kind.glyph);
    glyph.dataset.kind = kind.kind;
    glyph.setAttribute("aria-hidden", "true");
    node.append(glyph, element("span"), element("span", "legend-links"));
    return node;
  }, (node, kind) => {
    const numbers = counts.get(kind.kind) ?? [];
    setText(node.children[1], ` ${kind.text} ${count(numbers.length)}`);
    setAttribute(node, "data-none", numbers.length === 0 ? "true" : null);
    const links = kind.kind === "halted" ? numbers.slice(0, 12) : [];
    list(node.children[2], links, (key) => key, (key) => {
      const link = element("a", "", String(key));
      link.href = `#partition-${key}`;
      return link;
    }, () => {});
  });
  const badge = byId("nav-partitions");
  const cells = (...kinds) => kinds.reduce((sum, kind) => sum + (counts.get(kind) ?? []).length, 0);
  const halted = cells("halted");
  const late = cells("late", "very-late");
  setText(badge, halted > 0 ? `✕ ${halted} halted` : late > 0 ? `▲ ${late} late` : "");
  setAttribute(badge, "data-level", halted > 0 ? "bad" : late > 0 ? "warn" : null);
}

const TABLE = [
  { header: true, fill: (cell, partition) => {
    if (!cell.firstChild) cell.append(element("a"));
    cell.firstChild.href = `#partition-${partition.partition}`;
    setText(cell.firstChild, partition.partition);
  } },
  { fill: (cell, partition) => {
    const kind = BY_KIND.get(kindOf(partition));
    setText(cell, `${kind.glyph} ${partition.state}`);
  } },
  { className: "n", text: (partition) => count(partition.lag_records) },
  { className: "n", text: (partition) => seconds(partition.lag_seconds) },
  { className: "n", text: (partition) => count(partition.applied) },
  { className: "n", text: (partition) => count(partition.published) },
  { className: "n", text: (partition) => count(partition.end) },
  { text: (partition) => partition.instance },
  { text: (partition) => (partition.halted ? `${partition.halted.reason}: ${partition.halted.advice}` : "") },
];

function renderTable() {
  if (byId("partition-table-details").open) rows(byId("partition-table").tBodies[0], state.partitions, number, TABLE);
}

function renderPanel() {
  setHidden(byId("panel"), selected === null);
  if (selected === null || !state) return;
  const partition = state.partitions.find((one) => String(one.partition) === selected);
  setText(byId("panel-title"), `Partition ${selected}`);
  const missing = byId("panel-missing");
  setHidden(missing, Boolean(partition));
  setText(missing, "No instance that this page knows has this partition: it is being moved to another instance, or does not exist.");
  setHidden(byId("panel-halted"), !partition?.halted);
  setHidden(byId("panel-facts"), !partition);
  setAttribute(byId("panel"), "data-kind", partition ? kindOf(partition) : null);
  if (!partition) return;
  if (partition.halted) {
    setText(byId("panel-reason"), `✕ Halted: ${partition.halted.reason}`);
    setText(byId("panel-advice"), partition.halted.advice);
    setHidden(byId("panel-command-row"), !partition.halted.command);
    setHidden(byId("panel-how"), !partition.halted.command);
    setText(byId("panel-command"), partition.halted.command ?? "");
  }
  facts(byId("panel-facts"), panelFacts(partition));
}

function panelFacts(partition) {
  const kind = BY_KIND.get(kindOf(partition));
  const entries = [
    ["state", "State", `${kind.glyph} ${partition.state}${kind.isWarning ? `, ${kind.text}` : ""}`],
    ["since", "Since", (node) => fillTime(node, partition.since_ms, { now: state.at_ms, isLasting: true })],
    ["lag", "Lag", `${counted(partition.lag_records, "record")}; oldest ${seconds(partition.lag_seconds)}`],
    ["applied", "Applied, next to write", count(partition.applied)],
    ["published", "Published, next to publish", count(partition.published)],
  ];
  if (partition.unpublished_from !== null) entries.push(["unpublished", "Unpublished from", count(partition.unpublished_from)]);
  entries.push(["end", "End of the log", count(partition.end)]);
  if (partition.open_transaction_records > 0) {
    entries.push(["open", "Behind a producer's open transaction",
      `${counted(partition.open_transaction_records, "record")} for ${duration(partition.open_transaction_seconds)}`]);
  }
  entries.push(["lane", "Lane", partition.lane === null ? "of another instance" : partition.lane], ["instance", "Instance", partition.instance]);
  return entries;
}

function rove(key) {
  focused = key;
  for (const cell of byId("grid").children) setAttribute(cell, "tabindex", cell.dataset.key === key ? "0" : "-1");
}

function onKey(event) {
  const cells = [...byId("grid").children];
  const at = cells.indexOf(event.target);
  if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
  const columns = cells.filter((cell) => cell.offsetTop === cells[0].offsetTop).length;
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -at, End: cells.length - 1 - at };
  if (event.key === "Escape") return close();
  if (!(event.key in moves)) return;
  event.preventDefault();
  cells[at + moves[event.key]]?.focus();
}

/** Shows the partition that the address names, or none. */
function open(isLoad) {
  const match = /^#partition-(\d{1,9})$/.exec(location.hash);
  const before = selected;
  selected = match ? String(Number(match[1])) : null;
  if (!state || (selected === before && !isLoad)) return;
  renderGrid();
  renderPanel();
  if (selected === null) return;
  const partition = state.partitions.find((one) => String(one.partition) === selected);
  if (partition) rove(selected);
  const isInGrid = byId("grid").contains(document.activeElement);
  byId("panel").scrollIntoView({ block: "nearest" });
  // From a link the reader goes on in the panel; from a cell, in the grid.
  if (!isInGrid) byId("panel-title").focus({ preventScroll: true });
  else announce(`Partition ${selected}: details follow the grid`);
}

function close() {
  const cell = [...byId("grid").children].find((one) => one.dataset.key === selected);
  const isInside = byId("panel").contains(document.activeElement);
  history.pushState(null, "", location.pathname + location.search);
  open(false);
  if (isInside) cell?.focus();
}

async function copy() {
  const button = byId("panel-copy");
  const command = byId("panel-command");
  const isCopied = await copyText(command.textContent);
  if (!isCopied) getSelection().selectAllChildren(command);
  button.textContent = isCopied ? "Copied" : "Selected: press Ctrl+C";
  announce(isCopied ? "The command was copied" : "The command is selected, copy it with Ctrl+C");
  setTimeout(() => { button.textContent = "Copy"; }, 3_000);
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // A page of plain http that is not of localhost has no clipboard; the old way works there.
    const area = element("textarea", "vh");
    area.value = text;
    area.readOnly = true;
    byId("panel").append(area);
    const focus = document.activeElement;
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    focus?.focus();
    return isCopied;
  }
}
