/** Error messages in the form, at their fields or above the button. */

import { byId, setText } from "./dom.js";

export class FormErrors {
  #form;

  /** @param {HTMLFormElement} form The message of a field with the id `x` is in `#x-error`. */
  constructor(form) {
    this.#form = form;
  }

  /** Return whether a field has an element for messages. @param {string} name */
  has(name) {
    return this.#find(name) !== null;
  }

  /**
   * Show a message at a field.
   *
   * @param {string} name
   * @param {string} message
   * @param {boolean} focus Whether to focus the field.
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

  /** Hide the message of a field. @param {string} name */
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
    // The images have no form field with a value. The file picker stands for them.
    const field = name === "images" ? byId("files") : this.#form.elements[name];
    if (!(field instanceof HTMLElement)) return null;
    const text = document.getElementById(`${name === "images" ? name : field.id}-error`);
    return text && { field, text };
  }
}
