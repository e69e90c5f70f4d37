// The page: wires asking the daemon to the parts that show its answers.

import * as charts from "./charts.js";
import * as partitions from "./partitions.js";
import * as sections from "./sections.js";
import { announce, byId, element, fillTime, setAttribute, setHidden, setText } from "./dom.js";
import { duration, isAlwaysUtc, isZoneUtc, time, utcClock, zone } from "./format.js";
import { Poller } from "./poll.js";

/** Clocks that differ by more make times misleading. */
const CLOCK_SECONDS_MAX = 10;
const ICONS = { ok: ["#1a7f4b", "M3 8l4 4 6-8"], warn: ["#b26a00", "M8 3v6M8 11v2"], bad: ["#c62828", "M4 4l8 8M12 4l-8 8"], gone: ["#6b7280", "M4 8h8"], paused: ["#6b7280", "M6 4v8M10 4v8"] };
const WORDS = { ok: "OK", warn: "Warning", bad: "Fault", gone: "No answer", paused: "Paused" };

let state = null;
let trouble = null;
let firstVersion = null;

function onState(newState) {
  state = newState;
  firstVersion ??= state.version;
  head();
  sections.conditions(state);
  sections.tiles(state);
  partitions.render(state);
  sections.lanes(state);
  sections.problems(state);
  sections.deadLetters(state);
  sections.database(state);
  sections.audit(state);
  sections.peers(state);
}

function onTrouble(newTrouble) {
  trouble = newTrouble;
  head();
}

/** What the page says first: the daemon's sentence, or that it does not answer and since when. */
function head() {
  const isPaused = poller.isPaused && Boolean(state);
  const level = isPaused ? "paused" : trouble ? "gone" : state?.summary.level;
  if (level) {
    setAttribute(byId("head"), "data-level", level);
    icon(level);
  }
  setAttribute(document.body, "data-gone", trouble ? "true" : null);
  const sentence = isPaused ? `This page is paused. As of ${stamp(state.at_ms)}: ${state.summary.text}`
    : trouble ? troubleText() : state?.summary.text;
  if (sentence) {
    setText(byId("sentence"), sentence);
    announce(`${WORDS[level]}: ${sentence}`);
    document.title = `${WORDS[level]} – ${state?.instance ?? "payment-writer"}`;
  }
  const ofThen = byId("of-then");
  setHidden(ofThen, level !== "gone" || !state);
  if (level === "gone" && state) setText(ofThen, `What is shown is of then: ${state.summary.text}`);
  if (!state) return;
  about();
  const isNewPage = state.version !== firstVersion;
  setHidden(byId("reload"), !isNewPage);
  if (isNewPage) setText(byId("reload"), `▲ The daemon is now version ${state.version}; this page is of ${firstVersion}. Load it again.`);
}

/** A time of the reader's zone, UTC beside. */
function stamp(ms) {
  return `${time(ms)}${isZoneUtc(ms) ? " UTC" : ` (${utcClock(ms)})`}`;
}

function troubleText() {
  if (trouble.sinceMs === null) return `The daemon has not answered this page yet: ${trouble.reason}.`;
  const what = trouble.hasAnswered ? "The page is not current since" : "The daemon has not answered since";
  return `${what} ${stamp(trouble.sinceMs)}, for ${duration((Date.now() - trouble.sinceMs) / 1000)}: ${trouble.reason}.`;
}

function about() {
  const node = byId("about");
  if (!node.dataset.isTaken) {
    node.textContent = "";
    node.append(element("span"), element("span"));
    node.dataset.isTaken = "true";
  }
  const role = state.publishes ? "" : ", does not publish";
  setText(node.firstChild, `payment-writer ${state.version} · group ${state.group} · instance ${state.instance}${role} · started `);
  fillTime(node.lastChild, state.started_ms, { now: state.at_ms });
  const ahead = (Date.now() - state.at_ms) / 1000;
  const clock = !trouble && Math.abs(ahead) > CLOCK_SECONDS_MAX
    ? `. This computer's clock is ${duration(Math.abs(ahead))} ${ahead > 0 ? "ahead of" : "behind"} the daemon's` : "";
  setText(byId("updated"), `As of ${stamp(state.at_ms)}${trouble || poller.isPaused ? "" : ", renewed every 2 s"}${clock}.`);
}

function icon(level) {
  const link = byId("icon");
  if (link.dataset.level === level) return;
  link.dataset.level = level;
  const [fill, path] = ICONS[level];
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="${fill}"/><path d="${path}" fill="none" stroke="#fff" stroke-width="2.4"/></svg>`;
  link.href = `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

document.documentElement.classList.add("js");
setText(byId("zone"), isAlwaysUtc() ? "Times are in UTC." : `Times are in ${zone()}; UTC is beside.`);
const poller = new Poller({ onState, onHistory: charts.add, onTrouble });
charts.start();
partitions.start();
byId("pause").addEventListener("click", () => {
  poller.setPaused(!poller.isPaused);
  setText(byId("pause"), poller.isPaused ? "Resume" : "Pause");
  head();
});
// The time since the last answer goes on while there is none.
setInterval(() => trouble && head(), 1_000);
poller.now();
