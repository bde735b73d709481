// Lints an OpenAPI document with Redocly's recommended rules. Prints the problems as JSON.
const { createConfig, lint } = require("@redocly/openapi-core");

async function main(document) {
  // The project has no license yet that the document could name.
  const config = await createConfig({ extends: ["recommended"], rules: { "info-license": "off" } });
  const problems = await lint({ ref: document, config });
  const found = problems.map(({ ruleId, message, location }) => ({ ruleId, message, at: location[0].pointer }));
  console.log(JSON.stringify(found));
}

main(process.argv[2]);
