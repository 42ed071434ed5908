//! Which part of a long list is drawn, and how high the rest is. Everything is measured from the list's end, where a conversation is read: what changes
//! above the view then moves nothing in it.
//!
//! Pure. Invariant: however long the list is, the rows that are drawn fill the view and a margin, and no more.

/** Heights of rows: measured ones by key, and for the others what they probably are. */
export class Heights {
  readonly #measured = new Map<string, number>();
  #sum = 0;

  constructor(readonly fallback: number) {}

  get(key: string): number {
    return this.#measured.get(key) ?? this.probable;
  }

  /** Whether it was another before. */
  set(key: string, height: number): boolean {
    const old = this.#measured.get(key);
    if (old !== undefined && Math.abs(old - height) < 0.5) return false;
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
  readonly first: number;
  readonly end: number;
  /** How much is above and below them. */
  readonly above: number;
  readonly below: number;
}

/** `distance`: from the list's end to the lower edge of the view. */
export function spanOf(keys: readonly string[], heights: Heights, distance: number, view: number, margin: number): Span {
  const height = (at: number) => heights.get(keys[at] as string);
  let end = keys.length;
  let below = 0;
  while (end > 1 && below + height(end - 1) < distance - margin) {
    below += height(end - 1);
    end -= 1;
  }
  let first = end;
  let y = below;
  while (first > 0 && y < distance + view + margin) {
    first -= 1;
    y += height(first);
  }
  let above = 0;
  for (let at = 0; at < first; at += 1) above += height(at);
  return { first, end, above, below };
}

/** From the list's end to the lower edge of a row. */
export function distanceOf(keys: readonly string[], heights: Heights, index: number): number {
  let y = 0;
  for (let at = keys.length - 1; at > index; at -= 1) y += heights.get(keys[at] as string);
  return y;
}

/** The row that is so far from the list's end. */
export function indexAt(keys: readonly string[], heights: Heights, distance: number): number {
  let y = 0;
  for (let at = keys.length - 1; at >= 0; at -= 1) {
    y += heights.get(keys[at] as string);
    if (y > distance) return at;
  }
  return 0;
}
