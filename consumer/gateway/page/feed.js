/**
 * Keeps the active jobs in step with the server.
 *
 * Two jobs at most are followed by their event streams: a browser opens six connections to one server
 * over HTTP/1.1, and all tabs share them. The others are looked at in lists, every few seconds.
 */

import { ApiError, eventsPath, getJob, getQueue, listJobs } from "./api.js";
import { Job } from "./jobs.js";
import { backoff, follow, pause } from "./sse.js";

const STREAMS = 2;
const BUSY = 2_500; // milliseconds between two looks while jobs are active
const IDLE = 10_000; // milliseconds; jobs may be submitted elsewhere
const HIDDEN = 30_000; // milliseconds, for a tab in the background
const NEWEST = 20; // jobs of the list that each look reads
const MOST = 100; // jobs of one list
const MOST_SINGLE = 5; // jobs that one look reads one by one

export class Feed {
  #active;
  #streams = new Map(); // job id to AbortController
  #running = new AbortController();
  #sleep = new AbortController();
  #callbacks;
  #settled = false; // whether jobs beyond the newest ones have been looked for

  /**
   * @param {import("./jobs.js").ActiveJobs} active
   * @param {Object} callbacks
   * @param {(state: "connected"|"offline"|"refused", error?: ApiError) => void} callbacks.onConnection
   * @param {(job: Job) => void} callbacks.onEnded Called with jobs that have ended, each several times.
   * @param {(queue: Object) => void} callbacks.onQueue
   * @param {(event: Object) => void} callbacks.onStarted Called with each started event.
   */
  constructor(active, callbacks) {
    this.#active = active;
    this.#callbacks = callbacks;
    document.addEventListener("visibilitychange", () => this.#onVisibility());
  }

  /** Begin, or begin anew: with another API key, or after a refusal. */
  start() {
    this.stop();
    this.#running = new AbortController();
    this.#look(this.#running.signal);
  }

  /** End all streams and lists. */
  stop() {
    this.#running.abort();
    this.#release();
    this.#settled = false;
  }

  /** Look now. */
  wake() {
    this.#sleep.abort();
  }

  /** Follow those jobs that are next. */
  assign() {
    if (this.#running.signal.aborted || document.hidden) return;
    const wanted = this.#active.all.slice(0, STREAMS).map((job) => job.id);
    for (const [id, stream] of this.#streams) {
      if (!wanted.includes(id)) {
        stream.abort();
        this.#streams.delete(id);
      }
    }
    for (const id of wanted) if (!this.#streams.has(id)) this.#follow(id);
  }

  #onVisibility() {
    if (document.hidden) this.#release();
    else this.wake();
    this.assign();
  }

  // Tabs in the background leave their connections to the one in front.
  #release() {
    for (const stream of this.#streams.values()) stream.abort();
    this.#streams.clear();
  }

  async #look(signal) {
    let failures = 0;
    while (!signal.aborted) {
      let wait = 0;
      try {
        await this.#refresh(signal);
        failures = 0;
        wait = this.#interval;
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (signal.aborted) return;
        if (error.status === 401 || error.status === 403) return this.#refused(error);
        failures += 1;
        wait = Math.max(backoff(failures), (error.retryAfter ?? 0) * 1_000);
        if (error.status !== 429) this.#callbacks.onConnection("offline", error);
      }
      this.#sleep = new AbortController();
      await pause(wait, AbortSignal.any([signal, this.#sleep.signal]));
    }
  }

  get #interval() {
    if (this.#active.size) return document.hidden ? IDLE : BUSY;
    return document.hidden ? HIDDEN : IDLE;
  }

  #refused(error) {
    this.stop();
    this.#callbacks.onConnection("refused", error);
  }

  async #refresh(signal) {
    const seen = new Set();
    const missing = () =>
      this.#active.all.filter((job) => !seen.has(job.id) && !this.#streams.has(job.id));
    const look = async (ask) => {
      const asOf = performance.now();
      const answer = await ask();
      if (signal.aborted) throw new ApiError("", { code: "stopped" });
      return [answer, asOf];
    };
    const [newest, asOf] = await look(() => listJobs({ limit: NEWEST }));
    this.#callbacks.onConnection("connected");
    this.#take(newest.data, asOf, seen);
    if (newest.has_more && (missing().length || !this.#settled)) {
      const [list, asOf] = await look(() =>
        listJobs({ states: ["queued", "running"], limit: MOST }),
      );
      this.#take(list.data, asOf, seen);
    }
    this.#settled = true;
    for (const { id } of missing().slice(0, MOST_SINGLE)) {
      const [doc, asOf] = await look(() => this.#single(id));
      if (doc) this.#take([doc], asOf, seen);
    }
    const [queue] = await look(getQueue);
    this.#callbacks.onQueue(queue);
  }

  async #single(id) {
    try {
      return await getJob(id);
    } catch (error) {
      if (error.status !== 404) throw error;
      this.#active.forget(id); // its result has expired
      return null;
    }
  }

  #take(docs, asOf, seen) {
    for (const doc of docs) {
      seen.add(doc.id);
      const job = this.#active.update(doc, asOf);
      if (job === null || job.ended) this.#callbacks.onEnded(job ?? new Job(doc));
    }
    this.assign();
  }

  async #follow(id) {
    const stream = new AbortController();
    this.#streams.set(id, stream);
    try {
      await follow(eventsPath(id), {
        signal: stream.signal,
        onEvent: (event) => this.#onEvent(id, event),
        onBroken: (broken) => this.#callbacks.onConnection(broken ? "offline" : "connected"),
      });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401 || error.status === 403) this.#refused(error);
    }
    if (this.#streams.get(id) === stream) this.#streams.delete(id);
    if (!stream.signal.aborted) this.wake(); // the list knows more, or the next job is to be followed
  }

  #onEvent(id, { event, data }) {
    const job = this.#active.get(id);
    if (!job) return true;
    const body = JSON.parse(data);
    const before = job.state;
    const last = job.apply(event, body);
    if (event === "started") this.#callbacks.onStarted(body);
    this.#active.changed(job, before);
    if (last) this.#callbacks.onEnded(job);
    return last;
  }
}
