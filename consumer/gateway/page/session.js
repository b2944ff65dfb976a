/** Values that the page stores until its tab is closed. */

const KEY = "api-key";

function read(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null; // storage is disabled
  }
}

function write(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, value);
  } catch {
    // Storage is disabled or full. The page works without stored values.
  }
}

let key = read(KEY) ?? "";

/** Return the API key, or an empty string. */
export function apiKey() {
  return key;
}

/**
 * Store an API key, and delete all values that were stored for the previous key.
 *
 * @returns {boolean} Whether there was a key before.
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
    // Storage is disabled, so there are no values.
  }
}

/** Read a stored value; null if there is none. */
export function loadValue(name) {
  const text = read(name);
  try {
    return text === null ? null : JSON.parse(text);
  } catch {
    return null;
  }
}

/** Store a value as JSON. */
export function storeValue(name, value) {
  write(name, JSON.stringify(value));
}
