// Asks the daemon every 2 s, less often while the page is hidden, with growing distance while it does not answer.

const INTERVAL_MS = 2_000;
const INTERVAL_MS_MAX = 15_000;
/** So that the title of a tab in the background stays true. Browsers may ask once a minute. */
const INTERVAL_MS_HIDDEN = 30_000;
const TIMEOUT_MS = 10_000;
/** The state is computed anew every 2 s; an older one means that the daemon no longer does it. */
const STALE_MS = 20_000;

/** The last point of the history is at most this much newer than the state. */
const CLOCK_STEP_MS = 5_000;

/** What keeps the page from being current, in words. */
class Trouble extends Error {}

async function getJson(path) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", redirect: "error", signal: AbortSignal.timeout(TIMEOUT_MS) });
  } catch (error) {
    throw new Trouble(error.name === "TimeoutError" ? `no answer within ${TIMEOUT_MS / 1000} s` : "no connection");
  }
  if (!answer.ok) {
    throw Object.assign(new Trouble(refusal(answer.status)), { status: answer.status });
  }
  try {
    return await answer.json();
  } catch {
    throw new Trouble("the answer ended early or is not JSON");
  }
}

/** Of points in the order of their making, those after the last step of the clock backwards. Those before it are later. */
function ordered(points, latest) {
  const times = points.at_ms;
  const step = times.findLastIndex((at, index) => index > 0 && at <= times[index - 1]);
  const start = Math.max(step, times.findLastIndex((at) => at > latest) + 1);
  if (start <= 0) return points;
  return Object.fromEntries(Object.entries(points).map(([name, values]) => [name, Array.isArray(values) ? values.slice(start) : values]));
}

function refusal(status) {
  switch (status) {
    case 401: return "it asks for a password or token (401): load the page again to enter it";
    case 403: return "it does not allow this host name (403): see admin.hosts";
    case 404: return "it does not know this page's addresses (404): it may be of another version, load the page again";
    case 503: return "it refuses for now (503): its token file may be missing or empty, see its log";
    default: return `it answered with status ${status}`;
  }
}

/**
 * Calls `onState(state)`, `onHistory(columns, isNew)` and `onTrouble(null | {sinceMs, reason, hasAnswered})`.
 */
export class Poller {
  #after = 0;
  #process = "";
  #failures = 0;
  #timer = 0;
  #isBusy = false;
  #isPaused = false;
  #lastOkMs = null;
  #computed = { atMs: 0, seenMs: 0 };
  #on;

  constructor(handlers) {
    this.#on = handlers;
    document.addEventListener("visibilitychange", () => document.hidden || this.now());
    window.addEventListener("online", () => this.now());
    window.addEventListener("pageshow", (event) => event.persisted && this.now());
  }

  get isPaused() {
    return this.#isPaused;
  }

  setPaused(isPaused) {
    this.#isPaused = isPaused;
    if (isPaused) this.#stop();
    else this.now();
  }

  now() {
    this.#stop();
    this.#run();
  }

  #stop() {
    clearTimeout(this.#timer);
  }

  async #run() {
    if (this.#isBusy || this.#isPaused) return;
    this.#isBusy = true;
    try {
      await this.#once();
      this.#failures = 0;
      this.#lastOkMs = Date.now();
      this.#on.onTrouble(this.#stale());
    } catch (error) {
      if (!(error instanceof Trouble)) console.error(error);
      this.#failures += 1;
      // One request may meet a connection that was just closed.
      if (this.#failures > 1 || error.status || (this.#lastOkMs !== null && Date.now() - this.#lastOkMs > TIMEOUT_MS)) {
        const reason = error instanceof Trouble ? error.message : `this page failed: ${error.message}`;
        this.#on.onTrouble({ sinceMs: this.#lastOkMs, reason, hasAnswered: Boolean(error.status) });
      }
    } finally {
      this.#isBusy = false;
    }
    const wait = document.hidden ? INTERVAL_MS_HIDDEN
      : this.#failures === 1 ? 500 : Math.min(INTERVAL_MS * 1.5 ** Math.max(0, this.#failures - 2), INTERVAL_MS_MAX);
    this.#stop();
    this.#timer = setTimeout(() => this.#run(), wait);
  }

  async #once() {
    const state = await getJson("/console/state");
    if (this.#computed.atMs !== state.at_ms) this.#computed = { atMs: state.at_ms, seenMs: Date.now() };
    // The daemon's clock was set back: points after the step come first again.
    if (state.at_ms < this.#after - CLOCK_STEP_MS) this.#after = 0;
    const process = `${state.instance} ${state.version} ${state.started_ms}`;
    if (process !== this.#process) this.#after = 0;
    this.#process = process;
    this.#on.onState(state);
    const columns = await getJson(this.#after ? `/status/history?after=${this.#after}` : "/status/history");
    const points = ordered(columns.points ?? columns, state.at_ms + CLOCK_STEP_MS);
    const times = points.at_ms;
    const isNew = this.#after === 0;
    if (times.length > 0) this.#after = times[times.length - 1];
    this.#on.onHistory(points, isNew);
  }

  #stale() {
    if (Date.now() - this.#computed.seenMs < STALE_MS) return null;
    return { sinceMs: this.#computed.seenMs, reason: "it answers, but has not computed its state anew", hasAnswered: true };
  }
}
