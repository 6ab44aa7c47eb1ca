const typescript = require('typescript');
const webpack = require('webpack');

const output = typescript.transpileModule('const answer: number = 42; export { answer };', {});
if (!output.outputText.includes('42')) throw new Error('typescript did not compile');
webpack({ mode: 'none', entry: '/app/main.js', target: 'node' });
console.log('ready');
if (process.argv.length > 2) setTimeout(() => {}, Number(process.argv[2]) * 1000);
