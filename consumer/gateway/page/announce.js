/** Changes of state for screen readers: short sentences, gathered so that they do not flood. */

import { byId } from "./dom.js";

const GATHERED = 700; // milliseconds
const SPOKEN = 5; // sentences at a time; of more, the latest

const waiting = [];
let timer = null;

/** @param {string} text One sentence. */
export function announce(text) {
  waiting.push(text);
  timer ??= setTimeout(speak, GATHERED);
}

function speak() {
  timer = null;
  byId("announcer").textContent = waiting.splice(0).slice(-SPOKEN).join(" ");
}
