/** The dialog for the API key. */

import { byId } from "./dom.js";
import { apiKey, setApiKey } from "./session.js";

const HEADER_VALUE = /^[\x21-\x7e]+$/; // printable ASCII

/**
 * Bind the dialog to its button.
 *
 * @param {(replaced: boolean) => void} onChange Called after the user entered or removed a key, with
 *   whether there was a key before.
 * @returns {(problem?: string) => void} A function that opens the dialog.
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
    else showProblem(key ? "A key has letters, digits and ASCII symbols only." : "Enter a key.");
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
