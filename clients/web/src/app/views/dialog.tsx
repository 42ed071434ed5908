//! What is asked in front of everything else: the browser's own dialog, with focus and Esc as it does them.

import type { ComponentChildren, JSX } from 'preact';
import { useLayoutEffect, useRef } from 'preact/hooks';

import { texts } from '../texts';
import { Icon } from './icons';

export function Dialog({ title, onClose, children }: { title: string; onClose: () => void; children: ComponentChildren }): JSX.Element {
  const dialog = useRef<HTMLDialogElement>(null);
  useLayoutEffect(() => {
    const before = document.activeElement;
    const element = dialog.current;
    element?.showModal();
    return () => {
      // What is outside cannot have the focus as long as it is open.
      element?.close();
      if (before instanceof HTMLElement && before.isConnected) before.focus();
    };
  }, []);
  return (
    <dialog
      ref={dialog}
      class="dialog"
      aria-labelledby="dialog-title"
      onClose={onClose}
      onClick={(event) => event.target === dialog.current && onClose()}
    >
      <div class="dialog-inside">
        <header class="dialog-header">
          <h2 id="dialog-title">{title}</h2>
          <button type="button" class="round" aria-label={texts.close} onClick={onClose}>
            <Icon name="close" />
          </button>
        </header>
        {children}
      </div>
    </dialog>
  );
}

/** Asks whether it is meant. */
export function Sure(props: { title: string; text: string; yes: string; danger?: boolean; onYes: () => void; onClose: () => void }): JSX.Element {
  const { title, text, yes, danger = true, onYes, onClose } = props;
  return (
    <Dialog title={title} onClose={onClose}>
      <p class="dialog-text">{text}</p>
      <div class="dialog-buttons">
        <button type="button" class="button" onClick={onClose}>
          {texts.cancel}
        </button>
        <button
          type="button"
          class={danger ? 'button button-danger' : 'button button-main'}
          onClick={() => {
            onClose();
            onYes();
          }}
        >
          {yes}
        </button>
      </div>
    </Dialog>
  );
}
