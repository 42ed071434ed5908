//! Search in what is loaded of a conversation, from the newest match to older ones.

import type { JSX } from 'preact';
import { useLayoutEffect, useRef } from 'preact/hooks';

import type { Entry } from '../model/timeline';
import { lower } from '../model/words';
import { texts } from '../texts';
import { Icon } from './icons';

/** The seqs of the entries that have it, the newest first. */
export function matchesOf(entries: readonly Entry[], needle: string): number[] {
  const small = lower(needle);
  if (small.trim() === '') return [];
  const found: number[] = [];
  for (let at = entries.length - 1; at >= 0; at -= 1) {
    const { seq, text } = entries[at] as Entry;
    if (text !== undefined && lower(text).includes(small)) found.push(seq);
  }
  return found;
}

interface Props {
  needle: string;
  matches: readonly number[];
  at: number;
  onNeedle: (needle: string) => void;
  onStep: (by: number) => void;
  onClose: () => void;
}

export function SearchBar({ needle, matches, at, onNeedle, onStep, onClose }: Props): JSX.Element {
  const field = useRef<HTMLInputElement>(null);
  useLayoutEffect(() => field.current?.focus(), []);
  return (
    <div class="search" role="search">
      <input
        ref={field}
        type="search"
        value={needle}
        dir="auto"
        aria-label={texts.search.label}
        placeholder={texts.search.label}
        onInput={(event) => onNeedle(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === 'Enter') onStep(event.shiftKey ? -1 : 1);
          else if (event.key === 'Escape') onClose();
          else return;
          event.preventDefault();
          event.stopPropagation();
        }}
      />
      <span class="search-count" role="status">
        {needle.trim() !== '' && (matches.length === 0 ? texts.search.none : texts.search.of(at + 1, matches.length))}
      </span>
      <button type="button" class="round" aria-label={texts.search.older} disabled={matches.length === 0} onClick={() => onStep(1)}>
        <Icon name="up" />
      </button>
      <button type="button" class="round" aria-label={texts.search.newer} disabled={matches.length === 0} onClick={() => onStep(-1)}>
        <Icon name="down" />
      </button>
      <button type="button" class="round" aria-label={texts.search.close} onClick={onClose}>
        <Icon name="close" />
      </button>
    </div>
  );
}
