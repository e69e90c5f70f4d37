// Numbers, durations and times as text. What is not known is shown as "–".

const UNKNOWN = "–";
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en-US", { maximumFractionDigits: 1 });
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function count(value) {
  return isNumber(value) ? whole.format(value) : UNKNOWN;
}

/** "1 record", "2 records". */
export function counted(value, one, many = one + "s") {
  return `${count(value)} ${value === 1 ? one : many}`;
}

export function rate(value) {
  if (!isNumber(value)) return UNKNOWN;
  return `${(Math.abs(value) < 10 ? tenth : whole).format(value)}/s`;
}

/** A measured length of time: "85 ms", "1.2 s", "3 min". */
export function seconds(value) {
  if (!isNumber(value)) return UNKNOWN;
  if (value <= 0) return "0 s";
  if (value < 0.0995) return value < 0.001 ? "< 1 ms" : `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${tenth.format(value)} s`;
  return duration(value);
}

/** The same in one unit, for little room. */
export function brief(value) {
  return isNumber(value) ? seconds(value).split(" ").slice(0, 2).join(" ") : UNKNOWN;
}

/** How long something has lasted, in at most two units: "41 s", "3 min 5 s", "2 h 10 min", "5 d 3 h". */
export function duration(value) {
  if (!isNumber(value)) return UNKNOWN;
  const total = Math.max(0, Math.round(value));
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => total >= size);
  if (first < 0) return "0 s";
  const [name, size] = units[first];
  let text = `${whole.format(Math.floor(total / size))} ${name}`;
  const next = units[first + 1];
  const rest = next ? Math.floor((total % size) / next[1]) : 0;
  if (rest > 0 && Math.floor(total / size) < 10) text += ` ${rest} ${next[0]}`;
  return text;
}

export function bytes(value) {
  if (!isNumber(value)) return UNKNOWN;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${(value < 10 && unit > 0 ? tenth : whole).format(value)} ${units[unit]}`;
}

export function percent(share) {
  if (!isNumber(share)) return UNKNOWN;
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${(share < 0.1 && share > 0 ? tenth : whole).format(share * 100)} %`;
}

const two = (number) => String(number).padStart(2, "0");
const clock = (date) => `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
const day = (date) => `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
const instant = (ms) => {
  const date = new Date(ms);
  return isNumber(ms) && !Number.isNaN(date.getTime()) ? date : null;
};

/** In the reader's zone; of another day than `nowMs`, with the date and without seconds. */
export function time(ms, nowMs = Date.now()) {
  const date = instant(ms);
  if (!date) return UNKNOWN;
  const isToday = day(date) === day(new Date(nowMs));
  return isToday ? clock(date) : `${day(date)} ${clock(date).slice(0, 5)}`;
}

/** Hour and minute. */
export function minute(ms) {
  const date = instant(ms);
  return date ? clock(date).slice(0, 5) : UNKNOWN;
}

export function utc(ms) {
  const date = instant(ms);
  return date ? `${date.toISOString().slice(0, 19).replace("T", " ")} UTC` : UNKNOWN;
}

/** Time of day in UTC, with the date if it is not that of the reader's zone. Without places to break the line. */
export function utcClock(ms) {
  const date = instant(ms);
  const text = utc(ms);
  return (date && text.startsWith(day(date)) ? text.slice(11) : text).replaceAll(" ", "\u00a0").replaceAll("-", "\u2011");
}

export function iso(ms) {
  const date = instant(ms);
  return date ? date.toISOString() : "";
}

/** Whether the reader's clock shows UTC at that time. */
export function isZoneUtc(ms = Date.now()) {
  return new Date(ms).getTimezoneOffset() === 0;
}

/** Whether it does so all year. */
export function isAlwaysUtc() {
  const year = new Date().getFullYear();
  return [0, 6].every((month) => isZoneUtc(new Date(year, month).getTime()));
}

export function zone() {
  const name = Intl.DateTimeFormat().resolvedOptions().timeZone || "local";
  const minutes = -new Date().getTimezoneOffset();
  if (isAlwaysUtc()) return "UTC";
  const size = Math.abs(minutes);
  return `${name} (UTC${minutes < 0 ? "−" : "+"}${Math.floor(size / 60)}${size % 60 ? ":" + two(size % 60) : ""})`;
}
