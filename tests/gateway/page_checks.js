// Checks the accessibility of a page: names, structure, sizes, contrast. Evaluates to its problems.
() => {
  const problems = [];
  const shown = (node) => node.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  const clipped = (node) => node.closest(".visually-hidden, .skip") !== null;
  const name = (node) =>
    `<${node.tagName.toLowerCase()} id="${node.id}" class="${node.className}"> ${node.textContent.trim().slice(0, 40)}`;
  const report = (node, problem) => problems.push(`${problem}: ${name(node)}`);
  const all = (selector) => [...document.querySelectorAll(selector)];
  // Behind a modal dialog everything is inert.
  const modal = document.querySelector("dialog:modal");
  const reachable = (node) => shown(node) && (!modal || modal.contains(node));

  // -- structure --
  if (!document.documentElement.lang) problems.push("no language");
  if (!document.title) problems.push("no title");
  for (const [selector, count] of [
    ["main", 1],
    ["h1", 1],
    ["header", 1],
  ]) {
    if (all(selector).length !== count) problems.push(`${all(selector).length} of ${selector}`);
  }
  const ids = all("[id]").map(({ id }) => id);
  for (const id of ids)
    if (ids.indexOf(id) !== ids.lastIndexOf(id)) problems.push(`duplicate id ${id}`);
  for (const attribute of ["aria-labelledby", "aria-describedby", "for"]) {
    for (const node of all(`[${attribute}]`)) {
      for (const id of node.getAttribute(attribute).split(/\s+/)) {
        if (!document.getElementById(id))
          report(node, `${attribute} names the missing id ${id}`);
      }
    }
  }
  let level = 0;
  for (const heading of all("h1, h2, h3, h4").filter((node) => reachable(node) && !modal)) {
    const rank = Number(heading.tagName[1]);
    if (rank > level + 1) report(heading, `h${rank} follows h${level}`);
    level = rank;
  }
  for (const item of all("li"))
    if (!/^(UL|OL)$/.test(item.parentElement.tagName)) report(item, "a list item outside a list");
  for (const image of all("img")) if (!image.hasAttribute("alt")) report(image, "no alt");
  for (const node of all("[tabindex]"))
    if (node.tabIndex > 0) report(node, "a positive tabindex");
  for (const section of all("main section")) {
    if (!section.hasAttribute("aria-labelledby") && !section.querySelector("h2"))
      report(section, "a section without a name");
  }

  // -- names --
  const textOf = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (
      node.nodeType !== Node.ELEMENT_NODE ||
      node.getAttribute("aria-hidden") === "true" ||
      node.hidden
    )
      return "";
    if (node.tagName === "IMG") return node.alt;
    return node.getAttribute("aria-label") ?? [...node.childNodes].map(textOf).join("");
  };
  const accessibleName = (node) => {
    const ids = node.getAttribute("aria-labelledby");
    if (ids)
      return ids
        .split(/\s+/)
        .map((id) => textOf(document.getElementById(id)))
        .join(" ");
    if (node.getAttribute("aria-label")) return node.getAttribute("aria-label");
    if (node.labels?.length) return [...node.labels].map(textOf).join(" ");
    if (/^(INPUT|SELECT|TEXTAREA|PROGRESS)$/.test(node.tagName)) return "";
    return textOf(node);
  };
  const controls = all("a[href], button, input, select, textarea, summary, progress, dialog[open]");
  for (const node of controls.filter(reachable))
    if (!accessibleName(node).trim()) report(node, "no name");

  // -- sizes: at minimum 24 pixels, as WCAG 2.2 requires --
  for (const node of all("a[href], button, select, summary, .tasks label").filter(reachable)) {
    const { width, height } = node.getBoundingClientRect();
    if (!clipped(node) && (width < 24 || height < 24))
      report(node, `${Math.round(width)}×${Math.round(height)} pixels`);
  }

  // -- contrast --
  const colour = (text) => {
    const parts = text.match(/[\d.]+/g)?.map(Number) ?? [0, 0, 0, 0];
    if (text.startsWith("color(srgb"))
      return [...parts.slice(0, 3).map((part) => part * 255), parts[3] ?? 1];
    return [parts[0], parts[1], parts[2], parts[3] ?? 1];
  };
  const over = (top, bottom) => {
    const alpha = top[3] + bottom[3] * (1 - top[3]);
    if (alpha === 0) return [0, 0, 0, 0];
    return [0, 1, 2]
      .map((i) => (top[i] * top[3] + bottom[i] * bottom[3] * (1 - top[3])) / alpha)
      .concat(alpha);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((part) => {
      const value = part / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  // The colour behind an element; null if an image is behind it.
  const background = (node) => {
    let found = [0, 0, 0, 0];
    for (let each = node; each; each = each.parentElement) {
      const style = getComputedStyle(each);
      if (style.backgroundImage !== "none") return null;
      found = over(found, colour(style.backgroundColor));
      if (found[3] > 0.999) return found;
    }
    return over(found, [255, 255, 255, 1]);
  };
  const opacity = (node) => {
    let product = 1;
    for (let each = node; each; each = each.parentElement)
      product *= Number(getComputedStyle(each).opacity);
    return product;
  };
  const check = (node, text, minimum, what) => {
    const behind = background(node);
    if (!behind) return;
    const visible = over([text[0], text[1], text[2], text[3] * opacity(node)], behind);
    const ratio = contrast(visible, behind);
    if (ratio < minimum) report(node, `${what} has a contrast of ${ratio.toFixed(2)}, not ${minimum}`);
    if (ratio < lowest) lowest = ratio;
  };
  let lowest = Infinity;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || !reachable(node) || clipped(node)) continue;
    if (node.closest("[aria-disabled='true'], :disabled, option, script, noscript, svg")) continue;
    const style = getComputedStyle(node);
    const points = Number.parseFloat(style.fontSize);
    const large = points >= 24 || (points >= 18.66 && Number(style.fontWeight) >= 700);
    check(node, colour(style.color), large ? 3 : 4.5, "text");
  }
  for (const node of all("input:not([type='radio'], [type='file']), select, textarea").filter(
    reachable,
  )) {
    check(node.parentElement, colour(getComputedStyle(node).borderTopColor), 3, "the border");
    if (node.placeholder)
      check(node, colour(getComputedStyle(node, "::placeholder").color), 4.5, "the placeholder");
  }
  for (const node of all("progress[value]").filter(reachable))
    check(node.parentElement, colour(getComputedStyle(node).color), 3, "the bar");
  return { problems, lowest };
};
