/** Announces changes of state to screen readers, in batches of short sentences. */

import { byId } from "./dom.js";

const BATCH_INTERVAL = 700; // milliseconds
const MAX_SENTENCES = 5; // per announcement; earlier ones are dropped

const pending = [];
let timer = null;

/** Announce a sentence. @param {string} text */
export function announce(text) {
  pending.push(text);
  timer ??= setTimeout(flush, BATCH_INTERVAL);
}

function flush() {
  timer = null;
  byId("announcer").textContent = pending.splice(0).slice(-MAX_SENTENCES).join(" ");
}
