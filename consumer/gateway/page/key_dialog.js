/** The dialog in which the API key is entered. */

import { byId } from "./dom.js";
import { apiKey, setApiKey } from "./session.js";

const HEADER_VALUE = /^[\x21-\x7e]+$/; // what can be sent in a header

/**
 * Make the dialog work.
 *
 * @param {(replaced: boolean) => void} onChange Called after a key was entered or removed, with
 *   whether there was one before.
 * @returns {(problem?: string) => void} Opens the dialog.
 */
export function bindKeyDialog(onChange) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  const showProblem = (text) => {
    byId("key-error").textContent = text;
    byId("key-error").hidden = !text;
    input.toggleAttribute("aria-invalid", Boolean(text));
  };
  const use = (key) => {
    const replaced = setApiKey(key);
    dialog.close();
    onChange(replaced);
  };
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (HEADER_VALUE.test(key)) use(key);
    else showProblem(key ? "A key has letters, digits and signs only." : "Enter a key.");
  });
  byId("key-remove").addEventListener("click", () => use(""));
  byId("key-cancel").addEventListener("click", () => dialog.close());
  const open = (problem = "") => {
    input.value = apiKey();
    byId("key-remove").hidden = !apiKey();
    showProblem(problem);
    if (!dialog.open) dialog.showModal();
    input.select();
  };
  byId("key-button").addEventListener("click", () => open());
  return open;
}
