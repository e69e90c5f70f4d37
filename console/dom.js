// Changes to the document in place: what did not change keeps its node, and with it focus and selection.
// Everything that came from the server is set as text.

import { duration, isZoneUtc, iso, time, utc, utcClock } from "./format.js";

export const byId = (id) => document.getElementById(id);

export function setText(node, text) {
  const value = String(text);
  if (node.textContent !== value) node.textContent = value;
}

export function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) {
    node.setAttribute(name, String(value));
  }
}

export function setHidden(node, isHidden) {
  if (node.hidden !== isHidden) node.hidden = isHidden;
}

export function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

/** Makes the children of `parent` those of `items`, by key. `create(item)` makes a node, `update(node, item)` fills it. */
export function list(parent, items, keyOf, create, update) {
  const known = new Map();
  for (const child of [...parent.childNodes]) {
    if (child.dataset && child.dataset.key !== undefined && !known.has(child.dataset.key)) known.set(child.dataset.key, child);
    else child.remove();
  }
  let before = parent.firstChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let node = known.get(key);
    known.delete(key);
    if (!node) {
      node = create(item);
      node.dataset.key = key;
    }
    update(node, item);
    if (node === before) before = node.nextSibling;
    else parent.insertBefore(node, before);
  }
  for (const node of known.values()) node.remove();
}

/** Rows of a table. A column is {text(item) or fill(cell, item), header, className}. */
export function rows(body, items, keyOf, columns, update = () => {}) {
  const create = () => {
    const row = element("tr");
    for (const column of columns) {
      const cell = element(column.header ? "th" : "td", column.className);
      if (column.header) cell.scope = "row";
      row.append(cell);
    }
    return row;
  };
  list(body, items, keyOf, create, (row, item) => {
    columns.forEach((column, index) => {
      const cell = row.children[index];
      if (column.fill) column.fill(cell, item);
      else setText(cell, column.text(item));
    });
    update(row, item);
  });
}

/** Terms and their values: [key, term, value or function that fills a node]. */
export function facts(parent, entries) {
  list(parent, entries, ([key]) => key, ([, term]) => {
    const node = element("div");
    node.append(element("dt", "", term), element("dd"));
    return node;
  }, (node, [, , value]) => {
    if (typeof value === "function") value(node.lastChild);
    else setText(node.lastChild, value);
  });
}

/** Fills `node` with a time of the reader's zone, UTC beside, and, if `now` is given, how long ago it was. */
export function fillTime(node, ms, { now, isLasting = false, absent = "–" } = {}) {
  if (typeof ms !== "number") {
    setText(node, absent);
    return;
  }
  let stamp = node.querySelector("time");
  if (!stamp) {
    node.textContent = "";
    stamp = element("time");
    node.append(stamp, element("span", "utc"), element("span", "ago"));
  }
  setAttribute(stamp, "datetime", iso(ms));
  setAttribute(stamp, "title", utc(ms));
  setText(stamp, time(ms));
  setText(node.children[1], isZoneUtc(ms) ? "\u00a0UTC" : ` (${utcClock(ms)})`);
  if (now === undefined) setText(node.children[2], "");
  else if (ms > now) setText(node.children[2], `, in ${duration((ms - now) / 1000)}`);
  else setText(node.children[2], `, ${isLasting ? "for " : ""}${duration((now - ms) / 1000)}${isLasting ? "" : " ago"}`);
}

let announced = "";

/** Tells a screen reader `text`, unless it only differs from the last one in its numbers. */
export function announce(text) {
  const shape = text.replace(/[\d.,]+/g, "0");
  if (shape === announced) return;
  announced = shape;
  byId("announcer").textContent = text;
}
