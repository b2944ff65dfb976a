/** Creates elements from data. Data becomes text nodes and attributes, never markup. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Create an element.
 *
 * @param {string} tag
 * @param {Object} attributes `true` sets an empty attribute; `false`, `null` and `undefined` set none.
 *   `on` holds event listeners by event name.
 * @param {...(Node|string|null|undefined)} children
 * @returns {HTMLElement}
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (value === true) {
      node.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, value);
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/**
 * Create an icon of the sprite in index.html. It has no accessible name; its control has one.
 *
 * @param {string} name
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/**
 * Create a button that shows an icon only.
 *
 * @param {string} name Name of the icon.
 * @param {string} label For screen readers and the tooltip.
 * @param {() => void} onClick
 */
export function iconButton(name, label, onClick) {
  const attributes = { type: "button", class: "icon-button", "aria-label": label, title: label };
  return element("button", { ...attributes, on: { click: onClick } }, icon(name));
}

/** Return the element with an id; throw an error if the page has none. @param {string} id */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`index.html has no #${id}`);
  return found;
}

/** Set the text of an element if it differs, to avoid a needless layout. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}
