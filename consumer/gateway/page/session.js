/** What the page keeps for as long as its tab is open. Nothing of it outlives the tab. */

const KEY = "api-key";

function read(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null; // storage is switched off
  }
}

function write(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, value);
  } catch {
    // Switched off or full: the page goes on without what it would have kept.
  }
}

let key = read(KEY) ?? "";

/** The API key; empty where none was entered. */
export function apiKey() {
  return key;
}

/**
 * Keep an API key, and forget everything that was kept for the one before.
 *
 * @returns {boolean} Whether there was one before.
 */
export function setApiKey(value) {
  const before = key;
  key = value;
  if (before && before !== value) clear();
  write(KEY, value || null);
  return Boolean(before);
}

function clear() {
  try {
    sessionStorage.clear();
  } catch {
    // Nothing was kept.
  }
}

/** Read a value that `remember` has kept; null where there is none. */
export function recall(name) {
  const text = read(name);
  try {
    return text === null ? null : JSON.parse(text);
  } catch {
    return null;
  }
}

/** Keep a value that JSON can hold. */
export function remember(name, value) {
  write(name, JSON.stringify(value));
}
