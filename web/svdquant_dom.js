// Elements and words that the panel is made of.

/** A new element. Texts go in as text, never as markup: names of layers and files come from files. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** "-19.3 dB" with a real minus sign. */
export function decibels(value) {
  return `${value.toFixed(1).replace("-", "−")} dB`;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, count)) / 10));
  const value = count / 2 ** (10 * power);
  return `${value.toFixed(value < 100 && power ? 1 : 0)} ${units[power]}`;
}

/** "40 s", "3 min", "2 h 10 min". */
export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function ratio(large, small) {
  return `${(large / Math.max(1, small)).toFixed(2)}×`;
}
