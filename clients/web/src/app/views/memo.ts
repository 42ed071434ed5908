//! A component that is drawn again only if one of its properties is another.

import { Component, type ComponentType, type FunctionComponent } from 'preact';

export function memo<P extends object>(view: FunctionComponent<P>): ComponentType<P> {
  return class extends Component<P> {
    override shouldComponentUpdate(next: P): boolean {
      const old = this.props as Record<string, unknown>;
      const names = Object.keys(next);
      return names.length !== Object.keys(old).length || names.some((name) => (next as Record<string, unknown>)[name] !== old[name]);
    }
    override render() {
      return view(this.props as P);
    }
  };
}
