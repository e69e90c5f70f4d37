// Charts of the last 15 minutes, with the newest values as text and a table that can be opened.

import { bytes, count, minute, percent, rate, seconds, time, utc, zone } from "./format.js";
import { byId, element, rows, setAttribute, setText } from "./dom.js";

const SPAN_SECONDS = 900;
/** A longer distance of two points is shown as a gap. */
const GAP_MS = 5_000;
const HEIGHT = 150;
/** Seconds without records over which the line of the latency goes on. */
const IDLE_SECONDS = 30;

const COUNT_STEPS = Array.from({ length: 30 }, (_, at) => [1, 2, 5][at % 3] * 10 ** Math.floor(at / 3));
/** Distances of the memory axis: 1 MiB and its doubles. */
const BYTE_STEPS = Array.from({ length: 24 }, (_, power) => 2 ** (20 + power));
/** Distances of an axis of time, in seconds. */
const TIME_STEPS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400, 172800, 432000, 864000];
const cores = (value) => (typeof value === "number" ? `${value.toFixed(2)} cores` : "–");
const MEAN = "mean";
const MAX = "max";
// `color` is a custom property of console.css; series also differ by their dashes.
const CHARTS = [
  { id: "rate", title: "Records by outcome", format: rate, series: [
    { field: "written", label: "written", color: "--s1", of: MEAN, isFilled: true },
    { field: "duplicates", label: "duplicate", color: "--s2", dash: [6, 3], of: MEAN },
    { field: "dead_letters", label: "dead-lettered", color: "--s3", dash: [2, 2], of: MEAN },
    { field: "redelivered", label: "redelivered", color: "--s4", dash: [8, 3, 2, 3], of: MEAN }] },
  { id: "latency", title: "Latency, record to committed events", format: seconds, isLog: true, series: [
    { field: "latency_p99_seconds", label: "p99", color: "--s3", of: MAX },
    { field: "latency_p50_seconds", label: "p50", color: "--s1", dash: [6, 3], of: MEAN }] },
  { id: "lag", title: "Lag, records", format: count, steps: COUNT_STEPS, series: [
    { field: "lag_records", label: "waiting", color: "--s1", of: MAX, isFilled: true }] },
  { id: "oldest", title: "Lag, age of the oldest waiting record", format: seconds, steps: TIME_STEPS, series: [
    { field: "oldest_pending_seconds", label: "oldest", color: "--s1", of: MAX, isFilled: true }] },
  { id: "process", title: "CPU and memory of the daemon", format: cores, format2: bytes, series: [
    { field: "cpu_cores", label: "CPU", color: "--s1", of: MEAN },
    { field: "resident_bytes", label: "memory", color: "--s2", dash: [6, 3], of: MAX, scale: "y2" }] },
  { id: "phases", title: "Time of the lanes by phase, once a step has ended", format: percent, max: 1, series: [
    { field: "waiting", label: "waiting", color: "--s4", dash: [8, 3, 2, 3], of: MEAN },
    { field: "assembling", label: "assembling", color: "--s2", dash: [2, 2], of: MEAN },
    { field: "database", label: "database", color: "--s1", of: MEAN },
    { field: "kafka", label: "Kafka", color: "--s3", dash: [6, 3], of: MEAN }] },
];

const FIELDS = ["at_ms", "ready", ...CHARTS.flatMap((chart) => chart.series.map((series) => series.field))];
let points = emptyPoints();
let charts = [];

function emptyPoints() {
  return Object.fromEntries(FIELDS.map((field) => [field, []]));
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function start() {
  for (const spec of CHARTS) charts.push(new Chart(spec));
  const redraw = () => charts.forEach((chart) => chart.rebuild());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  // Printed on white.
  matchMedia("print").addEventListener("change", redraw);
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width === width) return;
    width = entry.contentRect.width;
    charts.forEach((chart) => chart.resize());
  }).observe(byId("chart-grid"));
}

export function add(columns, isNew) {
  if (isNew) points = emptyPoints();
  for (const field of FIELDS) points[field].push(...(columns[field] ?? columns.at_ms.map(() => null)));
  const last = points.at_ms[points.at_ms.length - 1];
  let old = 0;
  while (old < points.at_ms.length && points.at_ms[old] <= last - SPAN_SECONDS * 1000) old += 1;
  if (old > 0) for (const field of FIELDS) points[field].splice(0, old);
  charts.forEach((chart) => chart.draw());
  const shaded = points.ready.some((isReady) => isReady === false) ? " Shaded: database, broker or group was missing." : "";
  setText(byId("charts-note"), points.at_ms.length === 0 ? "The daemon has just started: nothing yet." : `Times: ${zone()}.${shaded}`);
}

/** Of each place with a gap, the index of the point after it. */
function gaps() {
  const found = [];
  for (let i = 1; i < points.at_ms.length; i += 1) {
    if (points.at_ms[i] - points.at_ms[i - 1] > GAP_MS) found.push(i);
  }
  return found;
}

function withGaps(values, places, make = () => null) {
  if (places.length === 0) return values;
  const result = [];
  let from = 0;
  for (const place of places) {
    result.push(...values.slice(from, place), make(place));
    from = place;
  }
  return result.concat(values.slice(from));
}

class Chart {
  #spec;
  #box = element("figure", "chart");
  #plot = element("div", "plot");
  #values = [];
  #at = element("span", "at muted");
  #table;
  #uplot = null;

  constructor(spec) {
    this.#spec = spec;
    this.#box.id = `chart-${spec.id}`;
    const caption = element("figcaption");
    caption.append(element("h3", "", spec.title));
    const legend = element("p", "chart-legend");
    for (const series of spec.series) {
      const item = element("span", "entry");
      const value = element("b");
      item.append(swatch(series), ` ${series.label} `, value);
      legend.append(item);
      this.#values.push(value);
    }
    legend.append(this.#at);
    caption.append(legend);
    this.#plot.setAttribute("role", "img");
    this.#table = this.#details();
    this.#box.append(caption, this.#plot, this.#table);
    byId("chart-grid").append(this.#box);
  }

  #details() {
    const details = element("details", "chart-table");
    const summary = element("summary", "", "By minute");
    summary.append(element("span", "vh", `: ${this.#spec.title}`));
    const scroll = element("div", "scroll tall");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", `${this.#spec.title}, by minute`);
    const table = element("table");
    const head = element("tr");
    head.append(headCell("Minute"));
    for (const series of this.#spec.series) head.append(headCell(`${series.label}, ${series.of}`, "n"));
    const thead = element("thead");
    thead.append(head);
    table.append(thead, element("tbody"));
    scroll.append(table);
    details.append(summary, scroll);
    details.addEventListener("toggle", () => this.#fillTable());
    return details;
  }

  #format(series) {
    return series.scale ? this.#spec.format2 : this.#spec.format;
  }

  #fillTable() {
    if (!this.#table.open) return;
    const minutes = new Map();
    points.at_ms.forEach((ms, index) => {
      const start = Math.floor(ms / 60_000) * 60_000;
      if (!minutes.has(start)) minutes.set(start, []);
      minutes.get(start).push(index);
    });
    const columns = [{ header: true, fill: (cell, [start]) => {
      setText(cell, minute(start));
      setAttribute(cell, "title", utc(start));
    } }];
    for (const series of this.#spec.series) {
      columns.push({ className: "n", text: ([, indexes]) => {
        const values = indexes.map((index) => points[series.field][index]).filter((value) => value !== null);
        if (values.length === 0) return "–";
        const value = series.of === MAX ? Math.max(...values) : values.reduce((sum, one) => sum + one, 0) / values.length;
        return this.#format(series)(value);
      } });
    }
    rows(this.#table.querySelector("tbody"), [...minutes].reverse(), ([start]) => start, columns);
  }

  #data() {
    const places = gaps();
    const times = withGaps(points.at_ms, places, (place) => points.at_ms[place - 1] + 1).map((ms) => ms / 1000);
    return [times, ...this.#spec.series.map((series) => {
      const values = withGaps(points[series.field], places);
      // A logarithmic axis has no zero.
      return this.#spec.isLog ? values.map((value) => (value === null ? null : Math.max(value, 0.001))) : values;
    })];
  }

  draw() {
    if (!this.#uplot) this.rebuild();
    else this.#uplot.setData(this.#data());
    this.#legend(null);
    this.#fillTable();
  }

  resize() {
    const width = this.#plot.clientWidth;
    // Print scales the picture.
    if (matchMedia("print").matches) return;
    if (this.#uplot && width > 0) this.#uplot.setSize({ width, height: HEIGHT });
    else this.draw();
  }

  /** The values under the pointer, or the newest ones. */
  #legend(index) {
    const last = points.at_ms.length - 1;
    const texts = this.#spec.series.map((series, number) => {
      const values = index === null ? points[series.field] : this.#uplot.data[number + 1];
      let at = index ?? last;
      // A second without records has no latency.
      if (index === null && this.#spec.isLog) while (at > 0 && values[at] === null && at > last - IDLE_SECONDS) at -= 1;
      const text = this.#format(series)(values[at]);
      setText(this.#values[number], text);
      return `${series.label} ${text}`;
    });
    setText(this.#at, index === null ? "" : `at ${time(this.#uplot.data[0][index] * 1000)}`);
    if (index === null) setAttribute(this.#plot, "aria-label", `Chart: ${this.#spec.title}. Now: ${texts.join(", ")}`);
  }

  rebuild() {
    const width = this.#uplot?.width ?? this.#plot.clientWidth;
    if (width === 0 || points.at_ms.length === 0) return;
    this.#uplot?.destroy();
    this.#uplot = new window.uPlot(this.#options(width), this.#data(), this.#plot);
  }

  #options(width) {
    const spec = this.#spec;
    const muted = color("--muted");
    const font = "11px system-ui, sans-serif";
    const grid = { stroke: color("--grid"), width: 1 };
    const axis = { stroke: muted, font, grid, ticks: { show: false }, size: 52, gap: 4 };
    const valuesBy = (format) => (u, splits) => splits.map((value) => (value === null ? "" : format(value)));
    const axes = [
      { ...axis, size: 22, space: 70, values: (u, splits) => splits.map((at) => minute(at * 1000)), incrs: [60, 300] },
      { ...axis, space: 30, incrs: spec.steps, values: valuesBy(spec.id === "process" ? (value) => String(Number(value.toFixed(2))) : spec.isLog ? decade : spec.format),
        ...(spec.isLog && { grid: { ...grid, filter: wholeDecades }, filter: wholeDecades }) },
    ];
    const scales = {
      x: { time: true, range: () => {
        const end = points.at_ms[points.at_ms.length - 1] / 1000;
        return [end - SPAN_SECONDS, end];
      } },
      y: spec.isLog ? { distr: 3, range: decades } : { range: (u, low, high) => [0, spec.max ?? top(high)] },
    };
    if (spec.format2) {
      axes.push({ ...axis, scale: "y2", side: 1, space: 30, incrs: BYTE_STEPS, grid: { show: false }, values: valuesBy(spec.format2) });
      scales.y2 = { range: (u, low, high) => [0, top(high)] };
    }
    return {
      width,
      height: HEIGHT,
      padding: [8, spec.format2 ? 0 : 12, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "history" }, drag: { x: false, y: false }, y: false, points: { size: 6 } },
      scales,
      axes,
      series: [{}, ...spec.series.map((series) => ({
        scale: series.scale ?? "y",
        stroke: color(series.color),
        fill: series.isFilled ? color(`${series.color}-fill`) : undefined,
        width: 1.5,
        dash: series.dash,
        points: { show: false },
        ...(spec.isLog && { gaps: longGaps }),
      }))],
      hooks: {
        drawClear: [shadeNotReady],
        setCursor: [(u) => this.#legend(u.cursor.idx ?? null)],
      },
    };
  }
}

function headCell(text, className) {
  const cell = element("th", className, text);
  cell.scope = "col";
  return cell;
}

/** The series' line as in the chart. */
function swatch(series) {
  const name = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(name, "svg");
  svg.setAttribute("width", "22");
  svg.setAttribute("height", "8");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(name, "line");
  for (const [key, value] of Object.entries({ x1: 0, y1: 4, x2: 22, y2: 4, "stroke-width": 2, "stroke-dasharray": (series.dash ?? []).join(" ") })) {
    line.setAttribute(key, value);
  }
  line.style.stroke = `var(${series.color})`;
  svg.append(line);
  return svg;
}

const top = (high) => (high > 0 ? high * 1.1 : 1);
const wholeDecades = (u, splits) => splits.map((value) => (Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-6 ? value : null));

const decade = (value) => (value < 0.05 ? `${Math.round(value * 1000)} ms` : `${Number(value.toFixed(1))} s`);

function longGaps(u, series, from, to, gaps) {
  const shortest = u.bbox.width * IDLE_SECONDS / SPAN_SECONDS;
  return gaps.filter(([left, right]) => right - left > shortest);
}

/** Whole decades around the values. */
function decades(u, low, high) {
  if (low === null || high === null) return [0.001, 1];
  const from = 10 ** Math.floor(Math.log10(low));
  return [from, Math.max(10 ** Math.ceil(Math.log10(high * 1.0001)), from * 10)];
}

/** Hatches the time in which something was missing. */
function shadeNotReady(u) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.strokeStyle = color("--hatch");
  ctx.lineWidth = window.devicePixelRatio;
  for (let i = 0; i < points.at_ms.length; i += 1) {
    if (points.ready[i] !== false) continue;
    const from = i;
    while (i + 1 < points.at_ms.length && points.ready[i + 1] === false) i += 1;
    const left = u.valToPos(points.at_ms[from] / 1000 - 1, "x", true);
    const right = u.valToPos(points.at_ms[i] / 1000, "x", true);
    hatch(ctx, left, right, bbox);
  }
  ctx.restore();
}

function hatch(ctx, left, right, { top: y, height }) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, y, Math.max(right - left, 1), height);
  ctx.clip();
  ctx.beginPath();
  const step = 6 * window.devicePixelRatio;
  // The lines keep their place while the time moves on.
  for (let x = Math.floor((left - height) / step) * step; x < right; x += step) {
    ctx.moveTo(x, y + height);
    ctx.lineTo(x + height, y);
  }
  ctx.stroke();
  ctx.restore();
}
