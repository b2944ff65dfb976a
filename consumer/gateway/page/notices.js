/** Messages at the top of the page. */

import { byId, element, iconButton, icon } from "./dom.js";

const shown = new Map();

/**
 * Show a message until the user closes it or `hideNotice` removes it.
 *
 * @param {string} name A second message with the same name replaces the first.
 * @param {string} text
 * @param {{label: string, onClick: () => void}|null} action Button in the message.
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

/** Remove a message. @param {string} name */
export function hideNotice(name) {
  shown.get(name)?.remove();
  shown.delete(name);
}
