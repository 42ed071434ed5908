//! A user as a circle: the first letter, in a colour that is always the user's, and whether the user is there.

import type { JSX } from 'preact';

import { texts } from '../texts';

export function Avatar({ user, online = false }: { user: string; online?: boolean }): JSX.Element {
  return (
    <span class="avatar" style={{ '--hue': hueOf(user) }}>
      <span aria-hidden="true">{user[0]?.toUpperCase()}</span>
      {online && (
        <span class="avatar-online">
          <span class="for-ears">{texts.list.online}</span>
        </span>
      )}
    </span>
  );
}

export function hueOf(user: string): number {
  let hash = 7;
  for (let at = 0; at < user.length; at += 1) hash = (hash * 31 + user.charCodeAt(at)) % 9973;
  return (hash * 137) % 360;
}
