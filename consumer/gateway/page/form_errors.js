/** Error messages in the form: each at its field, the others above the button. */

import { byId, setText } from "./dom.js";

export class FormErrors {
  #form;

  /** @param {HTMLFormElement} form Field `x` has its message in `#x-error`, by its id. */
  constructor(form) {
    this.#form = form;
  }

  /** Whether a field has a place for messages. @param {string} name */
  has(name) {
    return this.#find(name) !== null;
  }

  /**
   * Show a message at a field.
   *
   * @param {string} name
   * @param {string} message
   * @param {boolean} focus Whether the field gets the focus.
   */
  show(name, message, focus = false) {
    const { field, text } = this.#find(name);
    setText(text, message);
    text.hidden = false;
    field.setAttribute("aria-invalid", "true");
    const details = field.closest("details");
    if (details) details.open = true;
    if (focus) field.focus();
  }

  /** Show a message that belongs to no field. @param {string} message */
  showForForm(message) {
    setText(byId("form-error"), message);
    byId("form-error").hidden = false;
  }

  /** @param {string} name */
  clear(name) {
    const found = this.#find(name);
    if (!found) return;
    found.field.removeAttribute("aria-invalid");
    found.text.hidden = true;
  }

  clearAll() {
    for (const text of this.#form.querySelectorAll(".error")) text.hidden = true;
    for (const field of this.#form.querySelectorAll("[aria-invalid]"))
      field.removeAttribute("aria-invalid");
  }

  #find(name) {
    // The images are no field of the form with a value, but those of the file picker.
    const field = name === "images" ? byId("files") : this.#form.elements[name];
    if (!(field instanceof HTMLElement)) return null;
    const text = document.getElementById(`${name === "images" ? name : field.id}-error`);
    return text && { field, text };
  }
}
