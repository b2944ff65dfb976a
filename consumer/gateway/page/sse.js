/**
 * Server-sent events by fetch: EventSource cannot send the API key.
 *
 * A stream that breaks off is opened again after a pause, from the last event on that was seen.
 */

import { ApiError, send } from "./api.js";

const NO_MORE = 204; // the answer to the id of the last event
const SILENCE = 45_000; // milliseconds; the server sends a comment each 15 seconds
const FIRST_PAUSE = 500; // milliseconds
const LONGEST_PAUSE = 15_000; // milliseconds

/** Makes events of the text of a stream, which may arrive cut at any character. */
export class EventParser {
  #rest = "";
  #data = [];
  #event = "";
  #id = null;

  /**
   * @param {string} text
   * @returns {{event: string, data: string, id: string|null}[]} Those that are complete.
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
 * Wait, at most until the browser is online again or the signal aborts.
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

/** @param {number} failures In a row. */
export function backoff(failures) {
  const longest = Math.min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** failures);
  return longest / 2 + (Math.random() * longest) / 2;
}

/**
 * Read the events of a stream until one of them is the last.
 *
 * @param {string} path
 * @param {Object} options
 * @param {(event: {event: string, data: string, id: string|null}) => boolean} options.onEvent
 *   Returns whether the event was the last.
 * @param {(broken: boolean) => void} options.onBroken Called when the stream breaks off or works again.
 * @param {AbortSignal} options.signal Ends it.
 * @throws {ApiError} A refusal, for example of the API key or of an unknown job.
 */
export async function follow(path, { onEvent, onBroken, signal }) {
  let lastId = null;
  let failures = 0;
  while (!signal.aborted) {
    try {
      const onAny = () => {
        failures = 0;
        onBroken(false);
      };
      for await (const event of connection(path, lastId, signal, onAny)) {
        lastId = event.id ?? lastId;
        if (onEvent(event)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && !error.unreachable && error.status !== 429) throw error;
    }
    failures += 1;
    if (failures > 1) onBroken(true); // a server that ends a stream in peace is no outage
    await pause(backoff(failures), signal);
  }
}

async function* connection(path, lastId, signal, onAny) {
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), SILENCE);
  try {
    const headers = { Accept: "text/event-stream" };
    if (lastId !== null) headers["Last-Event-ID"] = lastId;
    const both = AbortSignal.any([signal, silence.signal]);
    const response = await send(path, { headers, signal: both, timeout: 0 });
    if (response.status === NO_MORE)
      throw new ApiError("The events have ended.", { status: NO_MORE });
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    const parser = new EventParser();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onAny();
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE);
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    clearTimeout(timer);
    silence.abort(); // ends the connection when the reader stops in the middle
  }
}
