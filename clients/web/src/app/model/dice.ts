//! Chance for tests that can be had again: every run of a seed is the same.

export class Dice {
  #state: number;

  constructor(readonly seed: number) {
    this.#state = seed || 1;
  }

  /** From 0 up to and without `below`. */
  roll(below: number): number {
    // xorshift32
    this.#state ^= this.#state << 13;
    this.#state ^= this.#state >>> 17;
    this.#state ^= this.#state << 5;
    return (this.#state >>> 0) % below;
  }

  pick<T>(from: readonly T[]): T {
    return from[this.roll(from.length)] as T;
  }
}

/** Runs a test with many seeds; which one it was is in the failure. */
export function withDice(runs: number, test: (dice: Dice) => void): void {
  for (let seed = 1; seed <= runs; seed += 1) {
    try {
      test(new Dice(seed * 7919));
    } catch (error) {
      throw new Error(`with seed ${seed}: ${error instanceof Error ? error.message : String(error)}`, { cause: error });
    }
  }
}
