// editr2_kernels._cuda: the functions of _native on a GPU, with the same keyword arguments except that
// `device` and `stream` say where they run. Tensors are (pointer, dtype code, batch stride) or, where they
// are plain buffers, addresses; 0 is absent. Importing it touches no GPU. The GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <tuple>
#include <vector>

#include "cuda/ops.h"

namespace py = pybind11;
using namespace editr2;
using py::arg;

namespace {

using release = py::call_guard<py::gil_scoped_release>;
using Tensor = std::tuple<uintptr_t, int, int64_t>;

gpu::Rows rows(const Tensor& t) { return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

template <class T>
T* at(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

gpu::Target target(int device, uintptr_t stream) { return {device, at<void>(stream)}; }

struct Call {
  int64_t batch;
  void* workspace;
  gpu::Target target;
};

// An operator on latents: what all of them take, then its own arguments, named by `own`.
template <class... Own, class... Names>
void def_latents(py::module_& m, const char* name, void (*run)(const gpu::Latents&, const Call&, Own...),
                 const Names&... own) {
  m.def(
      name,
      [run](Tensor x, Tensor v, Tensor m_prev, Tensor v_uncond, Tensor v_uncond_image, uintptr_t guidance, int renorm,
            int64_t width, uintptr_t table, int64_t table_rows, uintptr_t step_index, uintptr_t workspace,
            int64_t batch, int64_t n, int device, uintptr_t stream, Own... arguments) {
        run({rows(x), rows(v), rows(m_prev), rows(v_uncond), rows(v_uncond_image), at<float>(guidance), renorm, width,
             at<float>(table), table_rows, at<int64_t>(step_index), n},
            {batch, at<void>(workspace), target(device, stream)}, arguments...);
      },
      py::kw_only(), arg("x"), arg("v"), arg("m_prev"), arg("v_uncond"), arg("v_uncond_image"), arg("guidance"),
      arg("renorm"), arg("width"), arg("table"), arg("rows"), arg("step_index"), arg("workspace"), arg("B"), arg("N"),
      arg("device"), arg("stream"), own..., release());
}

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::istringstream words(EDITR2_CUDA_ARCHITECTURES);
  for (std::string word; words >> word;) names.push_back(word);
  return names;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of editr2_kernels; dtype codes are 0 float32, 1 bfloat16, 2 float16.";
  const auto kw = py::kw_only();

#if defined(EDITR2_EMULATED)
  m.attr("emulated") = true;
#else
  m.attr("emulated") = false;
#endif
  m.def("architectures", &architectures, "What the kernels are compiled for: sm_NN code, compute_NN PTX.");
  m.def("driver_version", &gpu::driver_version, 
        "1000 major + 10 minor of CUDA that the driver supports; 0 without one.");
  m.def("runtime_version", &gpu::runtime_version, "1000 major + 10 minor of the CUDA runtime linked in.");
  m.def("workspace", &gpu::workspace_bytes, arg("B"), arg("N"), arg("width"), arg("renorm"),
        "Bytes of scratch memory that are enough for any operator on latents of these sizes.");

  m.def(
      "philox_normal",
      [](uintptr_t seed, uintptr_t step, Tensor out, int64_t batch, int64_t n, int device, uintptr_t stream) {
        gpu::philox_normal(at<int64_t>(seed), at<int64_t>(step), rows(out), batch, n, target(device, stream));
      },
      kw, arg("seed"), arg("step"), arg("out"), arg("B"), arg("N"), arg("device"), arg("stream"), release());

  def_latents(
      m, "sde_step",
      +[](const gpu::Latents& latents, const Call& call, Tensor noise, uintptr_t seed, Tensor x_next, Tensor x0,
          uintptr_t log_prob, bool score_stored) {
        gpu::sde_step(latents, rows(noise), at<int64_t>(seed), rows(x_next), rows(x0), at<float>(log_prob),
                      score_stored, call.workspace, call.batch, call.target);
      },
      arg("noise"), arg("seed"), arg("x_next"), arg("x0"), arg("log_prob"), arg("score_stored"));

  def_latents(
      m, "sde_log_prob",
      +[](const gpu::Latents& latents, const Call& call, Tensor x_next, Tensor v_ref, uintptr_t log_prob,
          uintptr_t mean_diff) {
        gpu::sde_log_prob(latents, rows(x_next), rows(v_ref), at<float>(log_prob), at<float>(mean_diff),
                          call.workspace, call.batch, call.target);
      },
      arg("x_next"), arg("v_ref"), arg("log_prob"), arg("mean_diff"));

  def_latents(
      m, "grpo_loss",
      +[](const gpu::Latents& latents, const Call& call, Tensor x_next, Tensor v_ref, Tensor v_old,
          uintptr_t old_log_prob, uintptr_t advantage, uintptr_t mask, float clip_low, float clip_high,
          float advantage_clip, float kl_weight, int kl_scale, bool guard, float normalizer, uintptr_t loss,
          uintptr_t log_prob, uintptr_t ratio, uintptr_t kl, uintptr_t metrics, uintptr_t factors) {
        gpu::grpo_loss(latents, rows(x_next), rows(v_ref), rows(v_old),
                       {clip_low, clip_high, advantage_clip, kl_weight, kl_scale, guard},
                       {at<float>(old_log_prob), at<float>(advantage), at<uint8_t>(mask), normalizer, at<float>(loss),
                        at<float>(log_prob), at<float>(ratio), at<float>(kl), at<float>(metrics), at<float>(factors)},
                       call.workspace, call.batch, call.target);
      },
      arg("x_next"), arg("v_ref"), arg("v_old"), arg("old_log_prob"), arg("advantage"), arg("mask"), arg("clip_low"),
      arg("clip_high"), arg("advantage_clip"), arg("kl_weight"), arg("kl_scale"), arg("guard"), arg("normalizer"),
      arg("loss"), arg("log_prob"), arg("ratio"), arg("kl"), arg("metrics"), arg("factors"));

  def_latents(
      m, "replay_backward",
      +[](const gpu::Latents& latents, const Call& call, Tensor x_next, Tensor v_ref, Tensor v_old, uintptr_t factors,
          uintptr_t scale, uintptr_t grad_log_prob, uintptr_t grad_mean_diff, Tensor grad_v, Tensor grad_v_uncond,
          Tensor grad_v_uncond_image) {
        gpu::replay_backward(latents, rows(x_next), rows(v_ref), rows(v_old),
                             {at<float>(factors), at<float>(scale), at<float>(grad_log_prob),
                              at<float>(grad_mean_diff)},
                             rows(grad_v), rows(grad_v_uncond), rows(grad_v_uncond_image), call.workspace, call.batch,
                             call.target);
      },
      arg("x_next"), arg("v_ref"), arg("v_old"), arg("factors"), arg("scale"), arg("grad_log_prob"),
      arg("grad_mean_diff"), arg("grad_v"), arg("grad_v_uncond"), arg("grad_v_uncond_image"));

  m.def(
      "nft_loss",
      [](Tensor x0, Tensor noise, Tensor v, Tensor v_old, Tensor v_ref,
         uintptr_t sigma, uintptr_t r, uintptr_t mask, float beta, float advantage_max, float ref_weight,
         float min_weight, float normalizer, uintptr_t loss, uintptr_t metrics, uintptr_t factors,
         uintptr_t workspace, int64_t batch, int64_t n, int device, uintptr_t stream) {
        gpu::nft_loss({rows(x0), rows(noise), rows(v), rows(v_old), rows(v_ref), beta, n},
                      {beta, advantage_max, ref_weight, min_weight},
                      {at<float>(sigma), at<float>(r), at<uint8_t>(mask), normalizer, at<float>(loss),
                       at<float>(metrics), at<float>(factors)},
                      at<void>(workspace), batch, target(device, stream));
      },
      kw, arg("x0"), arg("noise"), arg("v"), arg("v_old"), arg("v_ref"), arg("sigma"), arg("r"), arg("mask"),
      arg("beta"), arg("advantage_max"), arg("ref_weight"), arg("min_weight"), arg("normalizer"), arg("loss"),
      arg("metrics"), arg("factors"), arg("workspace"), arg("B"), arg("N"), arg("device"), arg("stream"), release());

  m.def(
      "nft_loss_backward",
      [](Tensor x0, Tensor noise, Tensor v, Tensor v_old, Tensor v_ref, float beta,
         uintptr_t factors, uintptr_t scale, Tensor grad_v, int64_t batch, int64_t n, uintptr_t, int device,
         uintptr_t stream) {
        gpu::nft_loss_backward({rows(x0), rows(noise), rows(v), rows(v_old), rows(v_ref), beta, n},
                               at<float>(factors), at<float>(scale), rows(grad_v), batch, target(device, stream));
      },
      kw, arg("x0"), arg("noise"), arg("v"), arg("v_old"), arg("v_ref"), arg("beta"), arg("factors"), arg("scale"),
      arg("grad_v"), arg("B"), arg("N"), arg("workspace"), arg("device"), arg("stream"), release());

  m.def(
      "token_log_prob",
      [](const Tensor& logits, uintptr_t ids, double temperature, int64_t ignore_index, uintptr_t log_prob,
         uintptr_t entropy, uintptr_t lse, int64_t count, int64_t v, int device, uintptr_t stream) {
        gpu::token_log_prob({rows(logits), at<int64_t>(ids), temperature, ignore_index, count, v}, at<float>(log_prob),
                            at<float>(entropy), at<float>(lse), target(device, stream));
      },
      kw, arg("logits"), arg("ids"), arg("temperature"), arg("ignore_index"), arg("log_prob"), arg("entropy"),
      arg("lse"), arg("M"), arg("V"), arg("device"), arg("stream"), release());

  m.def(
      "token_log_prob_backward",
      [](const Tensor& logits, uintptr_t ids, double temperature, int64_t ignore_index, uintptr_t lse,
         uintptr_t entropy, uintptr_t grad_log_prob, uintptr_t grad_entropy, const Tensor& grad_logits, int64_t count,
         int64_t v, int device, uintptr_t stream) {
        gpu::token_log_prob_backward({rows(logits), at<int64_t>(ids), temperature, ignore_index, count, v},
                                     at<float>(lse), at<float>(entropy), at<float>(grad_log_prob),
                                     at<float>(grad_entropy), rows(grad_logits), target(device, stream));
      },
      kw, arg("logits"), arg("ids"), arg("temperature"), arg("ignore_index"), arg("lse"), arg("entropy"),
      arg("grad_log_prob"), arg("grad_entropy"), arg("grad_logits"), arg("M"), arg("V"), arg("device"),
      arg("stream"), release());

  m.def(
      "group_advantage",
      [](uintptr_t scores, uintptr_t group, uintptr_t weights, uintptr_t mask, uintptr_t applies, int aggregate,
         int fusion, int baseline, int std, bool unbiased, float eps, bool eps_floor, float clip, int filter_reward,
         bool filter_in_statistics, float min_std, float max_mean, uintptr_t advantage, uintptr_t mask_out,
         uintptr_t workspace, int64_t n, int64_t turns, int64_t rewards, int device, uintptr_t stream) {
        gpu::group_advantage({at<float>(scores), at<int64_t>(group), at<float>(weights), at<uint8_t>(mask),
                              at<uint8_t>(applies), aggregate, fusion, baseline, std, unbiased, eps, eps_floor, clip,
                              filter_reward, filter_in_statistics, min_std, max_mean, at<float>(advantage),
                              at<uint8_t>(mask_out), n, turns, rewards},
                             at<void>(workspace), target(device, stream));
      },
      kw, arg("scores"), arg("group"), arg("weights"), arg("mask"), arg("applies"), arg("aggregate"), arg("fusion"),
      arg("baseline"), arg("std"), arg("unbiased"), arg("eps"), arg("eps_floor"), arg("clip"), arg("filter_reward"),
      arg("filter_in_statistics"), arg("min_std"), arg("max_mean"), arg("advantage"), arg("mask_out"),
      arg("workspace"), arg("N"), arg("T"), arg("K"), arg("device"), arg("stream"), release());
}
