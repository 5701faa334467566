import './styles/tokens.css';
import './styles/base.css';
import './styles/grid.css';
import { mount } from 'svelte';

import App from './App.svelte';
import { app } from './lib/app.svelte';

app.start();
const target = document.getElementById('app');
if (target) mount(App, { target });
