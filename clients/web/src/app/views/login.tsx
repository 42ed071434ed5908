//! Who are you? A name is enough for a server in development mode; otherwise a password or a token.

import type { JSX } from 'preact';
import { useEffect, useRef, useState } from 'preact/hooks';

import type { Login as Who } from '../session';
import type { Phase } from '../entrance';
import { isName, nameOf } from '../model/words';
import { texts } from '../texts';
import { Icon } from './icons';

interface Props {
  phase: Extract<Phase, { at: 'login' | 'entering' }>;
  onEnter: (who: Who, stay: boolean) => void;
  onCancel: () => void;
}

export function Login({ phase, onEnter, onCancel }: Props): JSX.Element {
  const isEntering = phase.at === 'entering';
  const [user, setUser] = useState(phase.user);
  const [password, setPassword] = useState('');
  const [wants, setWants] = useState(false);
  const [stay, setStay] = useState(false);
  const [problem, setProblem] = useState<string>();
  const nameField = useRef<HTMLInputElement>(null);
  const passwordField = useRef<HTMLInputElement>(null);
  const withPassword = wants || (phase.at === 'login' && phase.withPassword) || password !== '';
  const told = problem ?? phase.problem;

  useEffect(() => {
    if (isEntering) return;
    (withPassword && user !== '' ? passwordField : nameField).current?.focus();
  }, [withPassword, isEntering]);

  const submit = (event: Event) => {
    event.preventDefault();
    const name = nameOf(user);
    if (!isName(name)) {
      setProblem(texts.login.badName);
      nameField.current?.focus();
      return;
    }
    setProblem(undefined);
    onEnter(withPassword && password !== '' ? { user: name, password } : { user: name }, stay);
  };

  return (
    <main class="login">
      <form class="login-card" onSubmit={submit}>
        <span class="login-mark">
          <Icon name="bubble" />
        </span>
        <h1>{texts.login.title}</h1>
        <p class="login-lead">{texts.login.lead}</p>
        <label class="field">
          <span class="field-label">{texts.login.name}</span>
          <input
            ref={nameField}
            name="username"
            value={user}
            autocomplete="username"
            autocapitalize="none"
            spellcheck={false}
            maxLength={80}
            dir="ltr"
            readOnly={isEntering}
            aria-invalid={problem !== undefined}
            aria-describedby="login-told"
            onInput={(event) => setUser(event.currentTarget.value)}
          />
        </label>
        {withPassword ? (
          <>
            <label class="field">
              <span class="field-label">{texts.login.password}</span>
              <input
                ref={passwordField}
                name="password"
                type="password"
                value={password}
                autocomplete="current-password"
                readOnly={isEntering}
                onInput={(event) => setPassword(event.currentTarget.value)}
              />
            </label>
            <label class="tick-field">
              <input type="checkbox" checked={stay} disabled={isEntering} onChange={(event) => setStay(event.currentTarget.checked)} />
              <span>{texts.login.stay}</span>
            </label>
          </>
        ) : (
          <button type="button" class="link-button" disabled={isEntering} onClick={() => setWants(true)}>
            {texts.login.withPassword}
          </button>
        )}
        <p id="login-told" class="login-told" role="alert">
          {told}
        </p>
        <div class="login-buttons">
          <button type="submit" class="button button-main button-wide" disabled={isEntering} aria-busy={isEntering}>
            {isEntering ? texts.login.entering : texts.login.enter}
          </button>
          {isEntering && (
            <button type="button" class="button" onClick={onCancel}>
              {texts.login.cancel}
            </button>
          )}
        </div>
      </form>
    </main>
  );
}

/** Where nobody can log in by hand. */
export function Refused({ problem }: { problem: string }): JSX.Element {
  return (
    <main class="login">
      <div class="login-card">
        <span class="login-mark">
          <Icon name="bubble" />
        </span>
        <h1>{texts.login.closed}</h1>
        <p class="login-told" role="alert">
          {problem}
        </p>
      </div>
    </main>
  );
}
