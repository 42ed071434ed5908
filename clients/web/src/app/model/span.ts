//! Which part of a long list is drawn, and how high the rest is.
//!
//! Pure. Invariant: however long the list is, the rows that are drawn fill the view and a margin, and no more.

/** Heights of rows: measured ones by key, and for the others what they probably are. */
export class Heights {
  #measured = new Map<string, number>();
  #sum = 0;

  constructor(readonly fallback: number) {}

  get(key: string): number {
    return this.#measured.get(key) ?? this.probable;
  }

  /** Whether it was another before. */
  set(key: string, height: number): boolean {
    const old = this.#measured.get(key);
    if (old === height) return false;
    this.#measured.set(key, height);
    this.#sum += height - (old ?? 0);
    return true;
  }

  /** After the width has changed nothing is as it was. */
  clear(): void {
    this.#measured.clear();
    this.#sum = 0;
  }

  get probable(): number {
    return this.#measured.size < 10 ? this.fallback : this.#sum / this.#measured.size;
  }
}

export interface Span {
  /** The rows from `first` on and before `end` are drawn. */
  first: number;
  end: number;
  /** How much is above and below them. */
  above: number;
  below: number;
}

/** The rows that are in the view from `top` on, and those within `margin` of it. */
export function spanOf(keys: readonly string[], heights: Heights, top: number, view: number, margin: number): Span {
  let y = 0;
  let first = 0;
  while (first < keys.length) {
    const height = heights.get(keys[first] as string);
    if (y + height > top - margin) break;
    y += height;
    first += 1;
  }
  if (first === keys.length && first > 0) {
    first -= 1;
    y -= heights.get(keys[first] as string);
  }
  const above = y;
  let end = first;
  while (end < keys.length && y < top + view + margin) {
    y += heights.get(keys[end] as string);
    end += 1;
  }
  let below = 0;
  for (let at = end; at < keys.length; at += 1) below += heights.get(keys[at] as string);
  return { first, end, above, below };
}

/** Where a row begins. */
export function offsetOf(keys: readonly string[], heights: Heights, index: number): number {
  let y = 0;
  for (let at = 0; at < index && at < keys.length; at += 1) y += heights.get(keys[at] as string);
  return y;
}
