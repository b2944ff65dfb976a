/**
 * Server-sent events with fetch, because EventSource cannot send the API key.
 *
 * After a broken stream the page waits and resumes the stream after the last received event.
 */

import { ApiError, send } from "./api.js";

const NO_CONTENT = 204; // the response to the id of the last event
const STALL_TIMEOUT = 45_000; // milliseconds; the server sends a comment every 15 seconds
const MIN_PAUSE = 500; // milliseconds
const MAX_PAUSE = 15_000; // milliseconds

/** Parses events from the text of a stream, in chunks of any size. */
export class EventParser {
  #rest = "";
  #data = [];
  #event = "";
  #id = null;

  /**
   * @param {string} text
   * @returns {{event: string, data: string, id: string|null}[]} The complete events.
   */
  push(text) {
    this.#rest += text;
    // A carriage return at the end may be the first half of a line end.
    const complete = this.#rest.endsWith("\r") ? this.#rest.slice(0, -1) : this.#rest;
    const lines = complete.split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + this.#rest.slice(complete.length);
    return lines.map((line) => this.#line(line)).filter(Boolean);
  }

  #line(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    if (colon === 0) return null; // a comment
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
    else if (field === "id" && !value.includes("\0")) this.#id = value;
    return null;
  }

  #dispatch() {
    const event = { event: this.#event || "message", data: this.#data.join("\n"), id: this.#id };
    const empty = this.#data.length === 0;
    this.#data = [];
    this.#event = "";
    return empty ? null : event;
  }
}

/**
 * Wait until the time is over, the browser is online again or the signal aborts.
 *
 * @param {number} milliseconds
 * @param {AbortSignal} signal
 */
export function pause(milliseconds, signal) {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      removeEventListener("online", end);
      signal.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, milliseconds);
    addEventListener("online", end);
    signal.addEventListener("abort", end);
  });
}

/** Return a random pause in milliseconds. @param {number} failures Consecutive failures. */
export function backoff(failures) {
  const upper = Math.min(MAX_PAUSE, MIN_PAUSE * 2 ** failures);
  return upper / 2 + (Math.random() * upper) / 2;
}

/**
 * Read the events of a stream until one of them is the last.
 *
 * @param {string} path
 * @param {Object} options
 * @param {(event: {event: string, data: string, id: string|null}) => boolean} options.onEvent
 *   Returns whether the event was the last.
 * @param {(broken: boolean) => void} options.onBroken Called when the stream breaks off or works again.
 * @param {AbortSignal} options.signal Stops the reading.
 * @throws {ApiError} An error that no retry fixes, for example an unknown job or API key.
 */
export async function follow(path, { onEvent, onBroken, signal }) {
  let lastId = null;
  let failures = 0;
  while (!signal.aborted) {
    try {
      const onData = () => {
        failures = 0;
        onBroken(false);
      };
      for await (const event of connection(path, lastId, signal, onData)) {
        lastId = event.id ?? lastId;
        if (onEvent(event)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && !error.unreachable && error.status !== 429) throw error;
    }
    failures += 1;
    if (failures > 1) onBroken(true); // a single regular end of a stream is no outage
    await pause(backoff(failures), signal);
  }
}

async function* connection(path, lastId, signal, onData) {
  const stall = new AbortController();
  let timer = setTimeout(() => stall.abort(), STALL_TIMEOUT);
  try {
    const headers = { Accept: "text/event-stream" };
    if (lastId !== null) headers["Last-Event-ID"] = lastId;
    const both = AbortSignal.any([signal, stall.signal]);
    const response = await send(path, { headers, signal: both, timeout: 0 });
    if (response.status === NO_CONTENT)
      throw new ApiError("The events have ended.", { status: NO_CONTENT });
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    const parser = new EventParser();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onData();
      clearTimeout(timer);
      timer = setTimeout(() => stall.abort(), STALL_TIMEOUT);
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    clearTimeout(timer);
    stall.abort(); // closes the connection if the caller stops early
  }
}
