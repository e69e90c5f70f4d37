// The parts of the page that show /console/state as lists and tables.

import { bytes, count, counted, duration, percent, rate, seconds, utc } from "./format.js";
import { byId, element, facts, fillTime, list, rows, setAttribute, setHidden, setText } from "./dom.js";

/** A task of housekeeping without a success for longer, and for two passes, is overdue. */
const TASK_MS_MAX = 8 * 86_400_000;

/** A lane that is longer in one thing than this stands out. */
const LANE_LONG_MS = 15_000;

function badge(id, text, level) {
  setText(byId(id), text);
  setAttribute(byId(id), "data-level", text ? level : null);
}

/** Numbers of faults and of warnings. */
function marks(id, faults, warnings) {
  const texts = [faults > 0 && `✕ ${faults}`, warnings > 0 && `▲ ${warnings}`].filter(Boolean);
  badge(id, texts.join(" "), faults > 0 ? "bad" : "warn");
}

export function conditions(state) {
  const holding = state.conditions.filter((condition) => condition.holds);
  holding.sort((one, other) => (other.severity === "page") - (one.severity === "page"));
  const rest = state.conditions.filter((condition) => !condition.holds);
  list(byId("conditions-holding"), holding, (condition) => condition.alert, createCondition, (node, condition) => fillCondition(node, condition, state.at_ms));
  list(byId("conditions-rest"), rest, (condition) => condition.alert, createCondition, (node, condition) => fillCondition(node, condition, state.at_ms));
  setHidden(byId("conditions-holding"), holding.length === 0);
  setHidden(byId("conditions-none"), holding.length > 0);
  setText(byId("conditions-none"), `✓ None of ${count(state.conditions.length)}, as far as this daemon can tell.`);
  setHidden(byId("conditions-others"), rest.length === 0);
  setText(byId("conditions-others-count"), `(${rest.length})`);
  const pages = holding.filter((condition) => condition.severity === "page").length;
  const tickets = holding.length - pages;
  marks("nav-conditions", pages, tickets);
}

function createCondition() {
  const node = element("li");
  const head = element("div", "condition-head");
  const link = element("a", "runbook", "Runbook, and whom to call");
  head.append(element("span", "severity"), element("strong"), link);
  node.append(head, element("p", "condition-detail"), element("p", "condition-since muted small"));
  return node;
}

function fillCondition(node, condition, now) {
  const [severity, title, link] = node.firstChild.children;
  const isPage = condition.severity === "page";
  setAttribute(node, "data-severity", condition.holds ? condition.severity : null);
  setText(severity, condition.holds ? (isPage ? "✕ Page" : "▲ Ticket") : isPage ? "page" : "ticket");
  setText(title, condition.title);
  // An address of this page's or another host: no script.
  if (/^(https?:\/\/|\/[^/])/.test(condition.runbook)) setAttribute(link, "href", condition.runbook);
  setAttribute(link, "aria-label", `Runbook, and whom to call, of ${condition.alert}`);
  setAttribute(link, "rel", "noreferrer");
  setHidden(node.children[1], !condition.detail);
  setText(node.children[1], condition.detail ?? "");
  const since = node.children[2];
  if (!since.firstChild) since.append(element("span"), element("span"));
  setText(since.firstChild, condition.alert);
  const when = since.lastChild;
  setHidden(when, !condition.holds || condition.since_ms === null);
  if (!when.hidden) {
    if (!when.firstChild) when.append(", since ", element("span"));
    fillTime(when.lastChild, condition.since_ms, { now, isLasting: true });
  }
}

const OUTCOMES = { written: "Written", duplicate: "Duplicate", dead_lettered: "Dead-lettered", redelivered: "Redelivered" };

export function tiles(state) {
  const items = state.outcomes.map((outcome) => ({
    key: outcome.outcome,
    term: OUTCOMES[outcome.outcome] ?? outcome.outcome,
    value: rate(outcome.per_second),
    more: `${count(outcome.total)} since the start`,
    level: outcome.outcome === "dead_lettered" && outcome.per_second > 0 ? "warn" : null,
  }));
  items.push(
    { key: "lag", term: "Records waiting", value: count(state.lag.records), more: "not yet written and published", level: null },
    { key: "oldest", term: "Oldest waiting", value: seconds(state.lag.oldest_seconds), more: "by the record's timestamp; halted partitions count",
      level: state.lag.oldest_seconds >= 60 ? "bad" : state.lag.oldest_seconds >= 5 ? "warn" : null });
  list(byId("tiles"), items, (item) => item.key, (item) => {
    const node = element("div", "tile");
    node.append(element("dt", "", item.term), element("dd", "value"), element("dd", "muted small"));
    return node;
  }, (node, item) => {
    setAttribute(node, "data-level", item.level);
    setText(node.children[1], item.level ? `${item.level === "bad" ? "✕" : "▲"} ${item.value}` : item.value);
    setText(node.children[2], item.more);
  });
}

const DOING = {
  waiting: "waiting for records", assembling: "filling a batch", database: "in the database", kafka: "in Kafka",
  recovering: "recovering partitions", starting_producer: "starting its producer", revoking: "giving partitions back",
  backing_off: "backing off before a new try", idle: "idle, no partitions",
};

export function lanes(state) {
  // Null while it waits.
  const lasted = (lane) => (lane.since_ms === null ? 0 : state.at_ms - lane.since_ms);
  const isLong = (lane) => lasted(lane) > LANE_LONG_MS;
  rows(byId("lane-rows"), state.lanes, (lane) => lane.lane, [
    { header: true, className: "n", text: (lane) => lane.lane },
    { className: "word-cell", text: (lane) => (isLong(lane) || lane.database || lane.broker ? "▲ " : "") + (DOING[lane.doing] ?? lane.doing) },
    { className: "n", fill: (cell, lane) => {
      setText(cell, lane.since_ms === null ? "–" : lasted(lane) < 1000 ? "< 1 s" : duration(lasted(lane) / 1000));
    } },
    { className: "n", text: (lane) => count(lane.records) },
    { className: "n", text: (lane) => count(lane.partitions) },
    { className: "n", text: (lane) => (lane.halted > 0 ? `✕ ${count(lane.halted)}` : "0") },
    { text: (lane) => [lane.database && `database: ${lane.database}`, lane.broker && `broker: ${lane.broker}`].filter(Boolean).join("; ") || "–" },
  ], (row, lane) => setAttribute(row, "data-level", isLong(lane) || lane.database || lane.broker ? "warn" : null));
  const long = state.lanes.filter((lane) => isLong(lane) || lane.database || lane.broker).length;
  badge("nav-lanes", long > 0 ? `▲ ${long}` : "", "warn");
  const missing = byId("missing");
  setHidden(missing, state.missing.length === 0);
  list(missing, state.missing, (one) => one.what, () => {
    const node = element("span", "line");
    node.append(element("span"), element("span"));
    return node;
  }, (node, one) => {
    setText(node.firstChild, `▲ Missing: ${one.what}, ${one.reason}. Since `);
    fillTime(node.lastChild, one.since_ms, { now: state.at_ms, isLasting: true });
  });
}

export function problems({ problems: { warnings, errors, last }, at_ms: now }) {
  setText(byId("problems-count"), `${counted(warnings, "warning")}, ${counted(errors, "error")} since the start${last.length > 0 ? "; the last ones, newest first" : ""}`);
  setHidden(byId("problems-none"), last.length > 0);
  setHidden(byId("problems-scroll"), last.length === 0);
  const seen = new Map();
  const items = last.map((problem) => {
    const key = `${problem.at} ${problem.level} ${problem.message}`;
    seen.set(key, (seen.get(key) ?? 0) + 1);
    return { ...problem, key: `${key} ${seen.get(key)}` };
  });
  rows(byId("problem-rows"), items.reverse(), (problem) => problem.key, [
    { className: "when", fill: (cell, problem) => fillTime(cell, Date.parse(problem.at)) },
    { className: "word-cell", text: (problem) => (problem.level === "ERROR" ? "✕ error" : "▲ warning") },
    { className: "message", text: (problem) => problem.message },
  ], (row, problem) => setAttribute(row, "data-level", problem.level === "ERROR" ? "bad" : null));
  const isNear = (problem) => now - Date.parse(problem.at) < 900_000;
  const newErrors = last.filter((problem) => problem.level === "ERROR" && isNear(problem)).length;
  badge("nav-problems", newErrors > 0 ? `✕ ${newErrors}` : "", "bad");
}

export function deadLetters(state) {
  const { by_reason: reasons, last } = state.dead_letters;
  const total = reasons.reduce((sum, reason) => sum + reason.count, 0);
  setText(byId("dead-letters-count"), total > 0 ? `${count(total)} since the start` : "");
  setHidden(byId("dead-letters-none"), total > 0);
  setHidden(byId("dead-letters-some"), total === 0);
  rows(byId("reason-rows"), reasons, (reason) => reason.reason, [
    { header: true, text: (reason) => reason.reason },
    { className: "n", text: (reason) => count(reason.count) },
    { className: "n", text: (reason) => percent(reason.count / total) },
  ]);
  rows(byId("dead-letter-rows"), last, (one) => `${one.partition}/${one.offset}`, [
    { className: "when", fill: (cell, one) => fillTime(cell, one.at_ms) },
    { className: "n", text: (one) => one.partition },
    { className: "n", text: (one) => String(one.offset) },
    { text: (one) => one.reason },
  ]);
  const recent = state.conditions.some((condition) => condition.alert === "PaymentWriterDeadLetters" && condition.holds);
  badge("nav-dead-letters", recent ? `▲ ${count(total)}` : "", "warn");
}

const TASKS = { generation: "Next generation", rotation: "Rotation of generations", pruning: "Dropping old generations", months: "Months of the payment tables" };

export function database(state) {
  const db = state.database;
  const now = state.at_ms;
  const asked = byId("database-asked");
  if (!asked.firstChild) asked.append(element("span"), element("span"));
  setText(asked.firstChild, db.read_ms === null ? "not read yet" : "as of ");
  setHidden(asked.lastChild, db.read_ms === null);
  if (db.read_ms !== null) fillTime(asked.lastChild, db.read_ms, { now });
  setHidden(byId("database-error"), db.error === null);
  setText(byId("database-error"), db.error === null ? "" : `▲ Not read: ${db.error}`);
  setHidden(byId("database-some"), db.read_ms === null);
  const keeping = db.housekeeping;
  facts(byId("database-facts"), [
    ["last", "Last pass", (node) => fillTime(node, keeping.last_pass_ms, { now, absent: "none yet" })],
    ["next", "Next pass", (node) => fillTime(node, keeping.next_pass_ms, { now, absent: "not known" })],
    ["horizon", "At the last pass, all records with a log time before this one were written and published", (node) => fillTime(node, db.horizon_ms, { now, absent: "not determined" })],
    ["default", "Rows in the default partitions", `${db.default_partition_rows > 0 ? "▲ " : ""}${count(db.default_partition_rows)}`],
    ["ahead", "Months created ahead", `${db.months_ahead === 0 ? "▲ " : ""}${count(db.months_ahead)}`],
  ]);
  const interval = keeping.next_pass_ms === null ? Infinity : keeping.next_pass_ms - (keeping.last_pass_ms ?? now);
  const isOverdue = (task) => task.last_ok_ms !== null && now - task.last_ok_ms > Math.max(TASK_MS_MAX, 2 * interval);
  rows(byId("task-rows"), keeping.tasks, (task) => task.task, [
    { header: true, text: (task) => TASKS[task.task] ?? task.task },
    { className: "word-cell", text: (task) => (task.is_failing ? "▲ failing" : task.last_ok_ms === null ? "no success recorded" : isOverdue(task) ? "▲ overdue" : "✓ ok") },
    { fill: (cell, task) => fillTime(cell, task.last_ok_ms, { now, absent: "none" }) },
  ], (row, task) => setAttribute(row, "data-level", task.is_failing || isOverdue(task) ? "warn" : null));
  rows(byId("generation-rows"), db.generations, (generation) => generation.name, [
    { header: true, className: "word-cell", text: (generation) => generation.name + (generation.is_current ? " (current)" : "") },
    // One that was never current has no age.
    { className: "word-cell", fill: (cell, { began_ms: began }) => {
      setText(cell, began === null ? "–" : duration((now - began) / 1000));
      setAttribute(cell, "title", began === null ? null : `since ${utc(began)}`);
    } },
    { fill: (cell, generation) => fillTime(cell, generation.drops_ms, { now, absent: generation.is_current ? "after it is closed" : "not known" }) },
    { className: "n", text: (generation) => count(generation.rows) },
    { className: "n", text: (generation) => bytes(generation.bytes) },
  ]);
  rows(byId("month-rows"), db.months, (month) => month.month, [
    { header: true, text: (month) => month.month },
    { className: "n", text: (month) => bytes(month.bytes) },
  ]);
  const failing = keeping.tasks.filter((task) => task.is_failing || isOverdue(task)).length;
  badge("nav-database", failing > 0 ? `▲ ${failing}` : db.error !== null ? "▲" : "", "warn");
}

const AUDITED = {
  owned: "written", duplicate: "duplicate", conflict: "id of another payment", invalid: "invalid, a dead letter",
  dead_letter: "rejected by the database, a dead letter", given_up: "given up by an operator", unknown: "no longer known",
  unaccounted: "unaccounted for",
};

export function audit(state) {
  const audit = state.audit;
  setHidden(byId("audit-off"), audit.is_on);
  setHidden(byId("audit-some"), !audit.is_on);
  const unaccounted = audit.results.find((result) => result.result === "unaccounted")?.count ?? 0;
  badge("nav-audit", unaccounted > 0 ? `✕ ${count(unaccounted)}` : "", "bad");
  if (!audit.is_on) return;
  facts(byId("audit-facts"), [
    ["waiting", "Offsets still to be read again", count(audit.waiting_offsets)],
    ["behind", "Behind the cursors", seconds(audit.behind_seconds)],
    ["suspects", "Suspects, to be checked once more", `${audit.suspects > 0 ? "▲ " : ""}${count(audit.suspects)}`],
    ["dropped", "Offsets left out", `${audit.dropped_offsets > 0 ? "▲ " : ""}${count(audit.dropped_offsets)}`],
    ["errors", "Failed reads, tried again", `${audit.errors > 0 ? "▲ " : ""}${count(audit.errors)}`],
  ]);
  setHidden(byId("audit-table"), audit.results.length === 0);
  rows(byId("audit-rows"), audit.results, (result) => result.result, [
    { header: true, text: (result) => AUDITED[result.result] ?? result.result },
    { className: "n", text: (result) => (result.result === "unaccounted" && result.count > 0 ? "✕ " : "") + count(result.count) },
  ], (row, result) => setAttribute(row, "data-level", result.result === "unaccounted" && result.count > 0 ? "bad" : null));
}

const LEVELS = { ok: "✓ ok", warn: "▲ warning", bad: "✕ fault" };

export function peers(state) {
  setHidden(byId("peers"), state.peers.length === 0);
  setHidden(byId("nav-peers-link"), state.peers.length === 0);
  rows(byId("peer-rows"), state.peers, (peer) => peer.address, [
    { header: true, fill: (cell, peer) => {
      if (!cell.firstChild) cell.append(element("span", "line"), element("span", "muted small"));
      setText(cell.firstChild, peer.instance || peer.address);
      setText(cell.lastChild, peer.instance ? peer.address : "");
    } },
    { className: "word-cell", text: (peer) => (peer.error === null ? LEVELS[peer.level] ?? peer.level : "? no answer") },
    { className: "message", text: (peer) => peer.error ?? peer.summary },
    { className: "n", text: (peer) => (peer.error === null ? count(peer.partitions) : "–") },
    { className: "n", text: (peer) => (peer.error === null ? count(peer.lag_records) : "–") },
    { className: "n", text: (peer) => (peer.error === null ? seconds(peer.oldest_seconds) : "–") },
    { text: (peer) => peer.version || "–" },
  ], (row, peer) => setAttribute(row, "data-level", peer.error !== null || peer.level === "warn" ? "warn" : peer.level === "bad" ? "bad" : null));
  const bad = state.peers.filter((peer) => peer.error === null && peer.level === "bad").length;
  const away = state.peers.filter((peer) => peer.error !== null).length;
  marks("nav-peers", bad, away);
}
