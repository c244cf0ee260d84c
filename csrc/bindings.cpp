// editr2_kernels._native: checked raw-pointer launchers. Pointers are Python ints (0 = absent), so the
// module knows no tensor library and one build serves every torch version. The GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/tokens.h"
#include "philox.h"

namespace py = pybind11;
using namespace editr2;

namespace {

template <class T>
T* at(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

using Rows = std::tuple<uintptr_t, int, int64_t>;  // [B, N]: pointer (0 = absent), dtype code, batch stride

Input input(const Rows& t) { return {at<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }
Output output(const Rows& t) { return {at<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

using release = py::call_guard<py::gil_scoped_release>;

// An operator on latents: what all of them take, then its own arguments, named by `own`.
template <class... Own, class... Names>
void def_latents(py::module_& m, const char* name, void (*run)(const Latents&, const Sizes&, Own...),
                 const Names&... own) {
  m.def(
      name,
      [run](Rows x, Rows v, Rows m_prev, Rows v_uncond, Rows v_uncond_image, uintptr_t guidance, int renorm,
            int64_t width, uintptr_t table, int64_t rows, uintptr_t step_index, uintptr_t, int64_t batch,
            int64_t n, int threads, Own... arguments) {
        const Latents latents = {input(x), input(v), input(m_prev), input(v_uncond), input(v_uncond_image),
                                 at<float>(guidance), renorm, width, at<float>(table),
                                 at<int64_t>(step_index), {}, nullptr};
        run(latents, {batch, n, rows, threads}, arguments...);
      },
      py::arg("x"), py::arg("v"), py::arg("m_prev"), py::arg("v_uncond"), py::arg("v_uncond_image"),
      py::arg("guidance"), py::arg("renorm"), py::arg("width"), py::arg("table"), py::arg("rows"),
      py::arg("step_index"), py::arg("workspace"), py::arg("B"), py::arg("N"), py::arg("threads"),
      own..., release());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of editr2_kernels; dtype codes are 0 float32, 1 bfloat16, 2 float16.";

  m.def("isa", [] { return active_kernels().name; }, "Instruction set in use.");
  m.def("supported_isas", &supported_isas, "Instruction sets this processor and build have.");
  m.def("set_isa", &set_isa, py::arg("name"), "Choose the instruction set (for tests).");

  m.def(
      "philox_bits",
      [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        uint32_t c[4] = {c0, c1, c2, c3};
        philox4x32_10<ScalarLanes>(c, k0, k1);
        return py::make_tuple(c[0], c[1], c[2], c[3]);
      },
      py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"), py::arg("k0"), py::arg("k1"),
      "The four raw words of one Philox4x32-10 block.");

  m.def(
      "workspace", [](int64_t, int64_t, int64_t, int) { return 0; }, py::arg("B"), py::arg("N"),
      py::arg("width"), py::arg("renorm"), "Bytes of scratch memory a latent operator needs: none here.");

  m.def(
      "philox_normal",
      [](uintptr_t seed, uintptr_t step, Rows out, int64_t batch, int64_t n, int threads) {
        philox_normal({at<int64_t>(seed), at<int64_t>(step), output(out), {}}, {batch, n, 0, threads});
      },
      py::arg("seed"), py::arg("step"), py::arg("out"), py::arg("B"), py::arg("N"),
      py::arg("threads"), release());

  def_latents(
      m, "sde_step",
      +[](const Latents& l, const Sizes& s, Rows noise, uintptr_t seed, Rows x_next, Rows x0,
          uintptr_t log_prob, bool score_stored) {
        sde_step({l, input(noise), at<int64_t>(seed), output(x_next), output(x0), score_stored},
                 at<float>(log_prob), s);
      },
      py::arg("noise"), py::arg("seed"), py::arg("x_next"), py::arg("x0"), py::arg("log_prob"),
      py::arg("score_stored"));

  def_latents(
      m, "sde_log_prob",
      +[](const Latents& l, const Sizes& s, Rows x_next, Rows v_ref, uintptr_t log_prob,
          uintptr_t mean_diff) {
        sde_log_prob({l, input(x_next), input(v_ref), input({}), false}, at<float>(log_prob),
                     at<float>(mean_diff), s);
      },
      py::arg("x_next"), py::arg("v_ref"), py::arg("log_prob"), py::arg("mean_diff"));

  def_latents(
      m, "grpo_loss",
      +[](const Latents& l, const Sizes& s, Rows x_next, Rows v_ref, Rows v_old, uintptr_t old_log_prob,
          uintptr_t advantage, uintptr_t mask, float clip_low, float clip_high, float advantage_clip,
          float kl_weight, int kl_scale, bool guard, float normalizer, uintptr_t loss,
          uintptr_t log_prob, uintptr_t ratio, uintptr_t kl, uintptr_t metrics, uintptr_t factors) {
        grpo_loss({{l, input(x_next), input(v_ref), input(v_old), false},
                   at<float>(old_log_prob), at<float>(advantage), at<uint8_t>(mask), clip_low, clip_high,
                   advantage_clip, kl_weight, kl_scale, guard, normalizer, at<float>(loss),
                   at<float>(log_prob), at<float>(ratio), at<float>(kl), at<float>(metrics),
                   at<float>(factors)},
                  s);
      },
      py::arg("x_next"), py::arg("v_ref"), py::arg("v_old"), py::arg("old_log_prob"),
      py::arg("advantage"), py::arg("mask"), py::arg("clip_low"), py::arg("clip_high"),
      py::arg("advantage_clip"), py::arg("kl_weight"), py::arg("kl_scale"), py::arg("guard"),
      py::arg("normalizer"), py::arg("loss"), py::arg("log_prob"), py::arg("ratio"), py::arg("kl"),
      py::arg("metrics"), py::arg("factors"));

  def_latents(
      m, "replay_backward",
      +[](const Latents& l, const Sizes& s, Rows x_next, Rows v_ref, Rows v_old, uintptr_t factors,
          uintptr_t scale, uintptr_t grad_log_prob, uintptr_t grad_mean_diff, Rows grad_v,
          Rows grad_v_uncond, Rows grad_v_uncond_image) {
        replay_backward({{l, input(x_next), input(v_ref), input(v_old), false},
                         nullptr, output(grad_v), output(grad_v_uncond), output(grad_v_uncond_image)},
                        {at<float>(factors), at<float>(scale), at<float>(grad_log_prob),
                         at<float>(grad_mean_diff)},
                        s);
      },
      py::arg("x_next"), py::arg("v_ref"), py::arg("v_old"), py::arg("factors"), py::arg("scale"),
      py::arg("grad_log_prob"), py::arg("grad_mean_diff"), py::arg("grad_v"),
      py::arg("grad_v_uncond"), py::arg("grad_v_uncond_image"));

  m.def(
      "nft_loss",
      [](Rows x0, Rows noise, Rows v, Rows v_old, Rows v_ref, uintptr_t sigma, uintptr_t r,
         uintptr_t mask, float beta, float advantage_max, float ref_weight, float min_weight,
         float normalizer, uintptr_t loss, uintptr_t metrics, uintptr_t factors, uintptr_t, int64_t batch,
         int64_t n, int threads) {
        nft_loss({{input(x0), input(noise), input(v), input(v_old), input(v_ref), beta, {}, nullptr, {}},
                  at<float>(sigma), at<float>(r), at<uint8_t>(mask), advantage_max, ref_weight, min_weight,
                  normalizer, at<float>(loss), at<float>(metrics), at<float>(factors)},
                 {batch, n, 0, threads});
      },
      py::arg("x0"), py::arg("noise"), py::arg("v"), py::arg("v_old"), py::arg("v_ref"),
      py::arg("sigma"), py::arg("r"), py::arg("mask"), py::arg("beta"), py::arg("advantage_max"),
      py::arg("ref_weight"), py::arg("min_weight"), py::arg("normalizer"), py::arg("loss"),
      py::arg("metrics"), py::arg("factors"), py::arg("workspace"), py::arg("B"), py::arg("N"),
      py::arg("threads"), release());

  m.def(
      "nft_loss_backward",
      [](Rows x0, Rows noise, Rows v, Rows v_old, Rows v_ref, float beta, uintptr_t factors,
         uintptr_t scale, Rows grad_v, uintptr_t, int64_t batch, int64_t n, int threads) {
        nft_loss_backward({input(x0), input(noise), input(v), input(v_old), input(v_ref), beta, {}, nullptr,
                           output(grad_v)},
                          at<float>(factors), at<float>(scale), {batch, n, 0, threads});
      },
      py::arg("x0"), py::arg("noise"), py::arg("v"), py::arg("v_old"), py::arg("v_ref"),
      py::arg("beta"), py::arg("factors"), py::arg("scale"), py::arg("grad_v"), py::arg("workspace"),
      py::arg("B"), py::arg("N"), py::arg("threads"), release());

  m.def(
      "group_advantage",
      [](uintptr_t scores, uintptr_t group, uintptr_t weights, uintptr_t mask, uintptr_t applies, int aggregate,
         int fusion, int baseline, int std, bool unbiased, float eps, bool eps_floor, float clip, int filter_reward,
         bool filter_in_statistics, float min_std, float max_mean, uintptr_t advantage, uintptr_t mask_out, uintptr_t,
         int64_t n, int64_t turns, int64_t rewards, int threads) {
        group_advantage({at<float>(scores), at<int64_t>(group), at<float>(weights), at<uint8_t>(mask),
                         at<uint8_t>(applies), aggregate, fusion, baseline, std, unbiased, eps, eps_floor, clip,
                         filter_reward, filter_in_statistics, min_std, max_mean, at<float>(advantage),
                         at<uint8_t>(mask_out), n, turns, rewards},
                        threads);
      },
      py::arg("scores"), py::arg("group"), py::arg("weights"), py::arg("mask"), py::arg("applies"),
      py::arg("aggregate"), py::arg("fusion"), py::arg("baseline"), py::arg("std"), py::arg("unbiased"),
      py::arg("eps"), py::arg("eps_floor"), py::arg("clip"), py::arg("filter_reward"),
      py::arg("filter_in_statistics"), py::arg("min_std"), py::arg("max_mean"), py::arg("advantage"),
      py::arg("mask_out"), py::arg("workspace"), py::arg("N"), py::arg("T"), py::arg("K"), py::arg("threads"),
      release());

  m.def(
      "token_log_prob",
      [](Rows logits, uintptr_t ids, double temperature, int64_t ignore_index, uintptr_t log_prob,
         uintptr_t entropy, uintptr_t lse, int64_t rows, int64_t v, int threads) {
        token_log_prob({input(logits), at<int64_t>(ids), temperature, ignore_index, at<float>(log_prob),
                        at<float>(entropy), at<float>(lse), rows, v},
                       threads);
      },
      py::arg("logits"), py::arg("ids"), py::arg("temperature"), py::arg("ignore_index"),
      py::arg("log_prob"), py::arg("entropy"), py::arg("lse"), py::arg("M"), py::arg("V"),
      py::arg("threads"), release());

  m.def(
      "token_log_prob_backward",
      [](Rows logits, uintptr_t ids, double temperature, int64_t ignore_index, uintptr_t lse,
         uintptr_t entropy, uintptr_t grad_log_prob, uintptr_t grad_entropy, Rows grad_logits,
         int64_t rows, int64_t v, int threads) {
        token_log_prob_backward({input(logits), at<int64_t>(ids), temperature, ignore_index,
                                 at<float>(lse), at<float>(entropy), at<float>(grad_log_prob),
                                 at<float>(grad_entropy), output(grad_logits), rows, v},
                                threads);
      },
      py::arg("logits"), py::arg("ids"), py::arg("temperature"), py::arg("ignore_index"),
      py::arg("lse"), py::arg("entropy"), py::arg("grad_log_prob"), py::arg("grad_entropy"),
      py::arg("grad_logits"), py::arg("M"), py::arg("V"), py::arg("threads"), release());
}
