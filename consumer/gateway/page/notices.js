/** Messages at the top of the page: what went wrong, and what is going on. */

import { byId, element, iconButton, icon } from "./dom.js";

const shown = new Map();

/**
 * Show a message until it is closed or taken back.
 *
 * @param {string} name A second message of one name replaces the first.
 * @param {string} text
 * @param {{label: string, onClick: () => void}|null} action A button of the message.
 */
export function showNotice(name, text, action = null) {
  if (shown.get(name)?.dataset.text === text) return;
  hideNotice(name);
  const notice = element(
    "div",
    { class: "notice", "data-text": text },
    icon("alert"),
    element("p", {}, text),
    action &&
      element(
        "button",
        { type: "button", class: "button quiet", on: { click: action.onClick } },
        action.label,
      ),
    iconButton("close", "Close this message", () => hideNotice(name)),
  );
  shown.set(name, notice);
  byId("notices").append(notice);
}

/** @param {string} name */
export function hideNotice(name) {
  shown.get(name)?.remove();
  shown.delete(name);
}
